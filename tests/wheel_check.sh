#!/usr/bin/env bash
# Builds the wheel and tests it with another CPython and, if TORCH_OTHER is set, another torch.
# `make test` does not run this script, because it installs torch again.
#
#   PYTHON_OTHER=python3.13 TORCH_OTHER=2.10.0 tests/wheel_check.sh
#   CUDA=1 TORCH_OTHER=2.11.0 tests/wheel_check.sh
#
# CUDA=1: the wheel must contain the CUDA library, and the other torch, built for CUDA, must load
#   it. This needs a CUDA toolkit but no GPU. It builds for compute capability 9.0 unless
#   ONEPASS_CUDA_ARCH names others.
# VENV_OTHER: a virtual environment to install into, which may have the other torch already;
#   default: a new one.
# PYTHON_OTHER: default: the first of python3.13 to python3.10 whose version differs from .venv, or
#   the Python of .venv if there is none.
# TORCH_OTHER: default: the version in .venv.
# The settings of pip (PIP_INDEX_URL, PIP_FIND_LINKS, ...) determine where torch comes from.
set -euo pipefail
cd "$(dirname "$0")/.."

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

[ -x .venv/bin/python ] || { echo "wheel_check: there is no .venv: run make setup first"; exit 1; }
built_with=$(version .venv/bin/python)
python=${PYTHON_OTHER:-}
if [ -z "$python" ]; then
  python=.venv/bin/python
  for candidate in python3.13 python3.12 python3.11 python3.10; do
    found=$(version "$candidate") || continue
    if [ "$found" != "$built_with" ]; then
      python=$candidate
      break
    fi
  done
fi
version "$python" >/dev/null || { echo "wheel_check: PYTHON_OTHER=$python does not run"; exit 1; }
here=$(.venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0])')
torch=${TORCH_OTHER:-$here}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "wheel_check: building with Python $built_with, torch $here"
rm -rf build
ONEPASS_CUDA=${CUDA:-0} ONEPASS_CUDA_ARCH=${ONEPASS_CUDA_ARCH:-9.0} \
  .venv/bin/python -m pip wheel --quiet --no-build-isolation --no-deps -w "$work" .
wheel=$(echo "$work"/onepass-*.whl)
case "$wheel" in
  *-py3-none-*.whl) echo "wheel_check: $(basename "$wheel")" ;;
  *) echo "wheel_check: $(basename "$wheel") is not tagged py3-none"; exit 1 ;;
esac

venv=${VENV_OTHER:-$work/venv}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
other=$venv/bin/python
echo "wheel_check: installing under Python $(version "$other") with torch $torch"
"$other" -m pip install --quiet "torch==$torch" numpy
"$other" -m pip install --quiet --no-deps --force-reinstall "$wheel"

echo "wheel_check: compiling against that torch's headers"
headers=$("$other" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
for source in csrc/ops.cpp csrc/cpu/ops.cpp csrc/cuda/ops.cpp; do
  "${CXX:-g++}" -std=c++17 -fsyntax-only -DUSE_CUDA -DTORCH_TARGET_VERSION=$((2 << 56 | 10 << 48))ULL \
    -Itests/cuda_shim -isystem "$headers" "$source"
done

echo "wheel_check: a type checker must see the package"
printf 'import torch, onepass\nonepass.AdamW([torch.ones(1)], states="mx9")\n' > "$work/typed.py"
if .venv/bin/python -m mypy --config-file= --cache-dir "$work/cache" --python-executable "$other" \
  "$work/typed.py" > "$work/types.log"; then
  echo "wheel_check: mypy accepts states=\"mx9\" of the installed package"
  exit 1
fi
grep -q 'incompatible type "Literal\[' "$work/types.log" || { cat "$work/types.log"; exit 1; }

# Run in another folder, so that Python imports the installed package. The option -P would do the
# same but needs Python 3.11.
cp tests/wheel_check.py "$work/"
cd "$work"
unset PYTHONPATH
if [ "${CUDA:-0}" = 1 ]; then cuda=cuda; fi
"$other" wheel_check.py "$venv" ${cuda:+cuda}
