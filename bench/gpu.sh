#!/usr/bin/env bash
# Builds, checks and measures the CUDA kernels on the GPU at hand, in under nine minutes and without
# a network. Every part runs whatever became of those before it; the last lines say which failed.
#
#   PYTHON=...  a Python with torch for CUDA, numpy, pytest and setuptools (default python3)
#   OUT=...     where logs go (default gpu-out)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-out}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

part() { # name, seconds, command...
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  echo "=== $name"
  timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 25 "$OUT/$name.log"
  echo "=== $name: exit status $status after $((SECONDS - start)) s"
  [ "$status" = 0 ] || failed+=("$name")
}

build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
  # setup.py names the package that a wheel would have; here it is a link to the folder.
  ln -sfn "$PWD/triton_kernels" python/onepass/triton_kernels
  ONEPASS_CUDA=1 ONEPASS_CUDA_ARCH=$arch "$PYTHON" setup.py -q build_ext --inplace
}

part build 200 build
part info 30 "$PYTHON" -m onepass info
part code 40 "$PYTHON" -m pytest tests/test_cuda_code.py
part bits 120 "$PYTHON" -m pytest -x tests/test_cuda_gpu.py
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
part memcheck 50 "$sanitizer" --error-exitcode 1 --tool memcheck "$PYTHON" tests/cuda_sanitize.py
part racecheck 50 "$sanitizer" --error-exitcode 1 --tool racecheck "$PYTHON" tests/cuda_sanitize.py
part bench 80 "$PYTHON" -m bench.gpu

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]} (logs in $OUT)"
  exit 1
fi
echo "all parts passed"
