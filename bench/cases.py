"""The benchmark cases of each device type."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

from onepass_tools.benchmark.cases import OPTIONS, Case
from onepass_tools.benchmark.param_lists import (
    ParamList,
    embedding,
    gpt2,
    llama3,
    many,
    one,
    resnet50,
    vit_l16,
)


def cpu_cases(quick: bool = False) -> list[Case]:
    """The cases of a CPU; quick: most of them with small lists, to try the benchmark itself."""
    big = one(1_000_000 if quick else 50_000_000)
    few, lots = (200, 500) if quick else (2000, 20_000)
    lists = [
        many(few, 256),
        many(lots, 256),
        many(300, 1),
        many(lots, 1),
        many(300, 4096),
        many(300, 4096, offset=1),
        gpt2(2, 64, 1000, 64) if quick else gpt2(),
    ]
    found = [
        Case("adamw", "fp32", "fp32", big),
        Case("adamw", "bf16", "bf16", big),
        Case("adamw", "bf16", "fp32", big),
        Case("adamw", "fp32", "mx8", big),
        Case("adamw", "bf16", "mx8", big, "split8"),
        Case("adamw", "bf16", "mx8", big, "stochastic"),
        Case("adamw", "bf16", "mx4", big, "stochastic"),
        Case("adamw", "fp32", "dynamic8", big),
        *(Case(rule, "fp32", "fp32", big) for rule in OPTIONS if rule != "adamw"),
        *(Case("adamw", "fp32", "fp32", params) for params in lists),
    ]
    if not quick:  # in bf16, because the tensors of all providers must fit in memory together
        found += [Case("adamw", "bf16", "bf16", params) for params in (llama3(32), vit_l16())]
        found.append(Case("sgd", "fp32", "fp32", resnet50()))
    return found


REDUCED = (
    ("stochastic", "mx8"),
    ("stochastic", "bf16"),
    ("split8", "fp32"),
    ("split8", "bf16"),
    ("split8", "mx4"),
    ("split16", "fp32"),
    ("kahan", "bf16"),
    ("kahan", "mx8"),
    ("master", "fp32"),
    ("master", "mx8"),
)
"""(weights, states) that are measured on a GPU although no target needs them."""


def gpu_cases(quick: bool = False) -> list[Case]:
    """The cases of a GPU, first those that the targets need."""
    big = one(1_000_000) if quick else llama3(16)
    rows = embedding(256 if quick else 128_000)
    small: list[ParamList] = [many(300, 256), many(200 if quick else 20_000, 256)]
    found = [
        Case("adamw", "fp32", "fp32", big),
        Case("adamw", "bf16", "bf16", big, "split16"),
        Case("adamw", "bf16", "mx8", big, "split16"),
        Case("adamw", "bf16", "mx8", big, "split8"),
        *(Case("adamw", "fp32", "fp32", params) for params in small),
        Case("adamw", "bf16", "bf16", big),
        Case("adamw", "bf16", "fp32", big),
        Case("adamw", "fp32", "mx8", big),
        Case("adamw", "bf16", "mx4", big, "stochastic"),
        Case("adamw", "fp32", "dynamic8", big),
        *(Case(rule, "fp32", "fp32", big) for rule in OPTIONS if rule != "adamw"),
        *(Case("adamw", "bf16", states, big, weights) for weights, states in REDUCED),
        Case("adamw", "fp16", "mx8", big, "stochastic"),
        *(Case(rule, "bf16", "mx8", big, "split8") for rule in ("lion", "sgd", "rmsprop")),
        Case("adamw", "fp32", "fp32", rows),
        Case("adamw", "bf16", "mx8", rows, "split8"),
        Case("adamw", "bf16", "mx4", rows, "stochastic"),
    ]
    if not quick:
        lists = [many(300, 4096), many(300, 4096, offset=1), many(2000, 256), many(20_000, 1)]
        lists += [gpt2(), vit_l16(), one(1_000_000_000)]
        found += [Case("adamw", "fp32", "fp32", params) for params in lists]
        found.append(Case("sgd", "fp32", "fp32", resnet50()))
    return found


CASES: dict[str, Callable[[bool], list[Case]]] = {"cpu": cpu_cases, "cuda": gpu_cases}


def select(cases: list[Case], pattern: str | None) -> list[Case]:
    """The cases whose name contains the pattern, or matches it if it contains wildcards; of several
    patterns, separated by commas, any one."""
    if pattern is None:
        return cases
    patterns = [
        part if any(character in part for character in "*?[") else f"*{part}*"
        for part in pattern.split(",")
    ]
    return [case for case in cases if any(fnmatch(case.name, part) for part in patterns)]
