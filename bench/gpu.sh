#!/usr/bin/env bash
# Builds, checks and measures the CUDA kernels on the GPU at hand, in under nine minutes and without
# a network. Every part runs whatever became of those before it; the last lines say which failed,
# and which could not run here.
#
#   bash bench/gpu.sh            every part but those that compile long or repeat much
#   bash bench/gpu.sh PART...    these alone; a second call for the others:
#   bash bench/gpu.sh tools wheels build peers sizes share ladder
#   bash bench/gpu.sh triton     checks the Triton kernels
#   bash bench/gpu.sh tools build pages paging   checks and measures paged states
#
#   PYTHON=...  a Python with torch for CUDA, numpy, pytest and setuptools (default python3)
#   OUT=...     where gpu.log and the result lines, *.jsonl, go (default gpu-out)
#   WHEELS=...  a folder of wheels of other libraries, installed under OUT for this run
#   COMMIT=...  what the sources are of, for the result lines, where git does not know
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-out}
mkdir -p "$OUT"
LOG=$OUT/gpu.log
: >"$LOG"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD/python:$PWD${WHEELS:+:$OUT/peers}${PYTHONPATH:+:$PYTHONPATH}"
wanted=" ${*:-tools wheels build info code bits quick memcheck racecheck bench phase counters} "
failed=()
skipped=()

say() { echo "$*" | tee -a "$LOG"; }

part() { # name, seconds, command...
  local name=$1 seconds=$2 start=$SECONDS status log=$OUT/part.log why
  shift 2
  [[ $wanted == *" $name "* ]] || return 0
  say "=== $name"
  timeout -k 5 "$seconds" "$@" >"$log" 2>&1
  status=$?
  cat "$log" >>"$LOG"
  tail -n 25 "$log"
  # What profilers and sanitizers say where the machine keeps the counters or the device from them.
  why=$(grep -m 1 -E 'Device not supported|LibraryNotLoaded|ERR_NVGPUCTRPERM|^not here: ' "$log")
  rm -f "$log"
  say "=== $name: exit status $status after $((SECONDS - start)) s"
  [ "$status" = 0 ] && return
  if [ -n "$why" ]; then skipped+=("$name ($why)"); else failed+=("$name"); fi
}

tool() { # name, arguments...: of PATH or of the toolkit
  local found
  found=$(command -v "$1" || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/$1") ||
    { echo "not here: $1 is neither on PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin"; return 1; }
  "$found" "${@:2}"
}

tools() {
  "$PYTHON" - <<'END'
import importlib.util, sys
need = ("torch", "numpy", "pytest", "setuptools")
missing = [name for name in need if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}")
import setuptools, torch
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__} is too old to build with: 77 or later")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU")
print(torch.__version__, torch.cuda.get_device_name())
END
}

wheels() { # Without their dependencies: torch is there, and stays as it is.
  [ -n "${WHEELS:-}" ] || { echo "none: WHEELS names no folder"; return 0; }
  local found=("$WHEELS"/*.whl)
  [ -e "${found[0]}" ] || { echo "$WHEELS has no wheel"; return 1; }
  "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$OUT/peers" "${found[@]}"
}

build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
  # setup.py names the package that a wheel would have; here it is a link to the folder.
  ln -sfn ../../triton_kernels python/onepass/triton_kernels
  ONEPASS_CUDA=1 ONEPASS_CUDA_ARCH=$arch "$PYTHON" setup.py -q build_ext --inplace
}

# Tests in several processes where pytest can: the reference, on the CPU, is what takes the time.
tests() {
  local workers=() cores
  cores=$(nproc)
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$((cores < 12 ? cores : 12))")
  export OMP_NUM_THREADS=1
  "$PYTHON" -m pytest -rs --maxfail 20 ${workers[@]+"${workers[@]}"} "$@"
}

quick() {
  tool nvcc -std=c++17 -O3 --fmad=false --expt-relaxed-constexpr -arch=native \
    tests/cuda_quick.cu -o "$OUT/quick" && "$OUT/quick"
}

sanitize() { # --report-api-errors: torch asks the driver for functions that it may lack.
  tool compute-sanitizer --error-exitcode 1 --report-api-errors no --tool "$1" \
    "$PYTHON" tests/cuda_sanitize.py
}

counters() { # Clocks as they are: a container may not set them.
  tool ncu --clock-control none --section SpeedOfLight --section LaunchStats --section Occupancy \
    --kernel-name regex:sweep --launch-skip 2 "$PYTHON" -m bench.steps --steps 3
}

export -f tool tools wheels build tests quick sanitize counters
export PYTHON OUT WHEELS

part tools 10 bash -c tools
part wheels 5 bash -c wheels
part build 150 bash -c build
part info 20 "$PYTHON" -m onepass info
part code 30 bash -c 'tests tests/test_cuda_code.py'
part bits 130 bash -c 'tests tests/test_cuda_gpu.py tests/test_cuda_gpu_step.py'
part quick 60 bash -c quick
part pages 100 bash -c 'tests tests/test_paging_gpu.py'
part memcheck 40 bash -c 'sanitize memcheck'
part racecheck 40 bash -c 'sanitize racecheck'
part bench 60 "$PYTHON" -m bench --device cuda --out "$OUT/gpu.jsonl" \
  --providers 'onepass-cuda,torch-fused*,torch-foreach'
part phase 20 "$PYTHON" -m bench.phase --device cuda --numel 500000000 --out "$OUT/phase.jsonl"
part paging 60 "$PYTHON" -m bench.paging --out "$OUT/paging.jsonl"
part counters 30 bash -c counters
part peers 240 "$PYTHON" -m bench --device cuda --out "$OUT/gpu.jsonl"
part sizes 40 "$PYTHON" -m bench.sizes --device cuda --out "$OUT/sizes.jsonl"
part share 30 "$PYTHON" -m bench.share --device cuda --out "$OUT/share.jsonl"
part ladder 90 "$PYTHON" -m bench.ladder --device cuda --out "$OUT/ladder.jsonl"
part triton 500 bash -c 'tests tests/test_triton_gpu.py'

[ ${#skipped[@]} -eq 0 ] || printf 'skipped: %s\n' "${skipped[@]}" | tee -a "$LOG"
if [ ${#failed[@]} -gt 0 ]; then
  say "failed: ${failed[*]} (see $LOG)"
  exit 1
fi
say "all ${skipped:+other }parts passed"
