#!/usr/bin/env bash
# Runs the tests and benchmarks that need a GPU, the most important first. docs/gpu.md describes the
# stages. No network is needed. The next call continues an interrupted one.
#
#   bash bench/gpu.sh                 run the parts that have not passed yet, within --limit (570 s)
#   bash bench/gpu.sh 1 tuning        run these stages
#   bash bench/gpu.sh --list          list the stages and their parts
#   bash bench/gpu.sh --dry           run small commands on the CPU
#   bash bench/gpu.sh --collect FILE  append the lines of a session to the files in bench/results
#
#   PYTHON=...  a Python with torch for CUDA, numpy, pytest and setuptools (default python3)
#   OUT=...     folder of results.jsonl and gpu.log (default gpu-out)
#   WHEELS=...  folder of wheels of other libraries, for stage 6
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-out}
export PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"

case " $* " in
  *" --list "* | *" --dry "* | *" --collect "* | *" --help "* | *" -h "*)
    exec "$PYTHON" -m bench.session --out "$OUT" "$@" ;;
esac

# In a wheel, setup.py adds triton_kernels/ as a package of onepass; here a link does the same.
[ -e python/onepass/triton_kernels ] || ln -sfn ../../triton_kernels python/onepass/triton_kernels

# Use libraries that were built on another machine if they load; otherwise build them.
if ! "$PYTHON" -c 'import sys; from onepass import ops; sys.exit(bool(ops.missing or ops.cuda_missing()))'; then
  echo "bench/gpu.sh: the compiled libraries do not load: building them"
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 2
  ONEPASS_CUDA=1 ONEPASS_CUDA_ARCH=$arch timeout 300 "$PYTHON" setup.py -q build_ext --inplace || exit 1
fi
exec "$PYTHON" -m bench.session --out "$OUT" "$@"
