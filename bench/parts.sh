# Shell functions for the commands of bench/stages.py. bench/session.py sources this file and sets
# PYTHON, PYTHONPATH and SCRATCH, a temporary folder.
set -uo pipefail

python() { "$PYTHON" "$@"; }

tool() { # NAME ARGUMENT...: runs a program from PATH or from the CUDA toolkit
  local found
  found=$(command -v "$1" || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/$1") ||
    { echo "not here: $1 is neither on PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin"; return 1; }
  "$found" "${@:2}"
}

# Runs tests in several processes if pytest-xdist is installed, because the reference, which runs on
# the CPU, takes most of the time.
tests() {
  local workers=() cores
  cores=$(nproc)
  if [ "$cores" -ge 4 ] && python -c 'import xdist' 2>/dev/null; then
    workers=(-n "$((cores < 12 ? cores : 12))")
  fi
  OMP_NUM_THREADS=1 python -m pytest -rs --maxfail 20 -p no:cacheprovider \
    --basetemp "$SCRATCH/pytest" ${workers[@]+"${workers[@]}"} "$@"
}

sanitize() { # --report-api-errors no: torch queries driver functions that may not exist
  tool compute-sanitizer --error-exitcode 1 --report-api-errors no --tool "$1" \
    "$PYTHON" tests/cuda_sanitize.py
}

counters() { # --clock-control none: a container is not allowed to set the clocks
  tool ncu --clock-control none --section SpeedOfLight --section LaunchStats --section Occupancy \
    --kernel-name regex:sweep --launch-skip 2 "$PYTHON" -m bench.steps --steps 3
}

peers() { # --no-deps: keeps the installed torch
  [ -n "${WHEELS:-}" ] || { echo "WHEELS is not set: only torch is measured"; return 0; }
  local found=("$WHEELS"/*.whl)
  [ -e "${found[0]}" ] || { echo "WHEELS=$WHEELS contains no wheel"; return 1; }
  python -m pip install --quiet --no-index --no-deps --upgrade --target "$SCRATCH/peers" "${found[@]}"
}

quick() {
  tool nvcc -std=c++17 -O3 --fmad=false --expt-relaxed-constexpr -arch=native \
    tests/cuda_quick.cu -o "$SCRATCH/quick" && "$SCRATCH/quick"
}
