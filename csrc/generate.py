"""Writes csrc/generated from the files of csrc/rules and from the limits in Python.

- ``limits.h``: the limits of onepass/rules/limits.py;
- ``rules.h``: the list of rules, one for each header of csrc/rules that defines a struct template
  of the file's own name (``nadam.h``: ``Nadam``), in alphabetical order, and the layout string that
  Python compares before it uses a library;
- ``cuda/sweep_<rule>.cu``: the file that compiles the CUDA kernels of one rule.

setup.py calls it before it compiles. It does not rewrite files that are up to date.
"""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIMITS = CSRC.parent / "python" / "onepass" / "rules" / "limits.py"
GENERATED = CSRC / "generated"
NOTE = "// Written by csrc/generate.py.\n"


def rules() -> list[str]:
    """The names of the rules in alphabetical order: headers that define a struct of their name."""
    found = []
    for path in sorted((CSRC / "rules").glob("*.h")):
        if re.search(rf"^struct {path.stem.capitalize()}\b", path.read_text(), re.MULTILINE):
            found.append(path.stem)
    return found


def limits() -> dict[str, int]:
    """Name -> value of each limit in onepass/rules/limits.py."""
    return {k: v for k, v in runpy.run_path(str(LIMITS)).items() if k.startswith("MAX_")}


def layout() -> str:
    """A string that identifies the numbers in a plan: the rules in order, and the limits."""
    return " ".join([*rules(), *(f"{name}={value}" for name, value in limits().items())])


def files() -> dict[str, str]:
    """Path in csrc/generated -> text of the file."""
    names = rules()
    constants = "".join(
        f"constexpr int k{name.title().replace('_', '')} = {value};\n"
        for name, value in limits().items()
    )
    made = {
        "limits.h": f"{NOTE}#pragma once\n\nnamespace onepass {{\n\n{constants}\n}}\n",
        "rules.h": NOTE
        + "#pragma once\n\n"
        + "".join(f'#include "../rules/{name}.h"\n' for name in names)
        + "\n#define ONEPASS_FOR_EACH_RULE(RULE, ARG) \\\n"
        + " \\\n".join(f"  RULE({i}, {n.capitalize()}, ARG)" for i, n in enumerate(names))
        + f"\n\nnamespace onepass {{\n\nconstexpr int kRules = {len(names)};\n"
        + f'constexpr char kLayout[] = "{layout()}";\n\n}}\n',
    }
    for name in names:
        rule = name.capitalize()
        made[f"cuda/sweep_{name}.cu"] = (
            f'{NOTE}#include "../../cuda/rule_kernels.cuh"\n\nnamespace onepass::cuda {{\n'
            f"const RuleKernels k{rule}Kernels = kernels_of<{rule}>();\n}}\n"
        )
    return made


def write() -> None:
    """Writes the files of csrc/generated that have changed, and deletes stale ones."""
    made = files()
    for path in GENERATED.rglob("*.*"):
        if path.relative_to(GENERATED).as_posix() not in made:
            path.unlink()
    for name, text in made.items():
        path = GENERATED / name
        if path.exists() and path.read_text() == text:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(text)
        os.replace(part, path)


if __name__ == "__main__":
    write()
