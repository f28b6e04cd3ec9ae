"""Each file of examples/ runs and reduces its loss, or names the missing package."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from .support.scripts import run_script

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
NEEDS = {"hf_trainer.py": ("transformers", "accelerate"), "lightning_fit.py": ("lightning",)}
BELOW = {"hf_trainer.py": 1.0, "low_rank.py": 0.01}  # the first losses are 4.2 and 0.2


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_learns(name, tmp_path):
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    # One thread, because more threads only add waiting in such small models.
    result = run_script(FOLDER / name, tmp_path, threads=1)
    if missing:  # onepass does not depend on it; the example names it
        assert result.returncode == 1
        assert re.fullmatch(r"This example needs (\w+): pip install .*\n", result.stderr)
        assert re.search(r"needs (\w+):", result.stderr)[1] in missing
        pytest.skip(f"{', '.join(missing)} not installed")
    assert result.returncode == 0, result.stderr
    loss = float(re.search(r"^loss (\d+\.\d+)\n\Z", result.stdout, re.M).group(1))
    assert loss < BELOW.get(name, 0.12), result.stdout


def test_the_list_of_examples_is_whole():
    listed = re.findall(r"\]\((\w+\.py)\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == EXAMPLES
