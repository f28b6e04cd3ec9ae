# The commands of bench/stages.py that are not one program. Sourced by bench/session.py, which sets
# PYTHON, PYTHONPATH and SCRATCH, a folder that is thrown away.
set -uo pipefail

python() { "$PYTHON" "$@"; }

tool() { # name, arguments...: of PATH or of the toolkit
  local found
  found=$(command -v "$1" || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/$1") ||
    { echo "not here: $1 is neither on PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin"; return 1; }
  "$found" "${@:2}"
}

# Tests in several processes where pytest can: the reference, on the CPU, is what takes the time.
tests() {
  local workers=() cores
  cores=$(nproc)
  if [ "$cores" -ge 4 ] && python -c 'import xdist' 2>/dev/null; then
    workers=(-n "$((cores < 12 ? cores : 12))")
  fi
  OMP_NUM_THREADS=1 python -m pytest -rs --maxfail 20 -p no:cacheprovider \
    --basetemp "$SCRATCH/pytest" ${workers[@]+"${workers[@]}"} "$@"
}

sanitize() { # --report-api-errors: torch asks the driver for functions that it may lack.
  tool compute-sanitizer --error-exitcode 1 --report-api-errors no --tool "$1" \
    "$PYTHON" tests/cuda_sanitize.py
}

counters() { # Clocks as they are: a container may not set them.
  tool ncu --clock-control none --section SpeedOfLight --section LaunchStats --section Occupancy \
    --kernel-name regex:sweep --launch-skip 2 "$PYTHON" -m bench.steps --steps 3
}

peers() { # Without their dependencies: torch is there, and stays as it is.
  [ -n "${WHEELS:-}" ] || { echo "WHEELS names no folder of wheels: torch alone is measured"; return 0; }
  local found=("$WHEELS"/*.whl)
  [ -e "${found[0]}" ] || { echo "$WHEELS has no wheel"; return 1; }
  python -m pip install --quiet --no-index --no-deps --upgrade --target "$SCRATCH/peers" "${found[@]}"
}

quick() {
  tool nvcc -std=c++17 -O3 --fmad=false --expt-relaxed-constexpr -arch=native \
    tests/cuda_quick.cu -o "$SCRATCH/quick" && "$SCRATCH/quick"
}
