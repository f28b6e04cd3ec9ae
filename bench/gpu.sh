#!/usr/bin/env bash
# Runs what is worth doing with a borrowed GPU, most valuable first: docs/gpu.md says what each stage
# shows. Without a network. A call that is interrupted goes on with the next one.
#
#   bash bench/gpu.sh                 what has no evidence yet, as far as --limit allows (570 s)
#   bash bench/gpu.sh 1 tuning        these stages
#   bash bench/gpu.sh --list          names them
#   bash bench/gpu.sh --dry           the same on a CPU, tiny
#   bash bench/gpu.sh --collect FILE  brings the lines of a session to bench/results
#
#   PYTHON=...  a Python with torch for CUDA, numpy, pytest and setuptools (default python3)
#   OUT=...     where results.jsonl and gpu.log go (default gpu-out)
#   WHEELS=...  a folder of wheels of other libraries, for stage 6
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-out}
export PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"

case " $* " in
  *" --list "* | *" --dry "* | *" --collect "* | *" --help "* | *" -h "*)
    exec "$PYTHON" -m bench.session --out "$OUT" "$@" ;;
esac

# setup.py names the package that a wheel would have; here it is a link to the folder.
[ -e python/onepass/triton_kernels ] || ln -sfn ../../triton_kernels python/onepass/triton_kernels

# Libraries that were built elsewhere are taken as they are, where they load.
if ! "$PYTHON" -c 'import sys; from onepass import ops; sys.exit(bool(ops.missing or ops.cuda_missing()))'; then
  echo "the libraries do not load: building them"
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 2
  ONEPASS_CUDA=1 ONEPASS_CUDA_ARCH=$arch timeout 300 "$PYTHON" setup.py -q build_ext --inplace || exit 1
fi
exec "$PYTHON" -m bench.session --out "$OUT" "$@"
