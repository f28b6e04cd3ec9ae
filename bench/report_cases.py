"""The lines of a report by case, and the words for a case and a device; used by bench.report."""

from __future__ import annotations

import re
from typing import Any

from onepass.optim.registry import classes
from onepass_tools.benchmark.timing import LIMITS

from .cases import cpu_cases, gpu_cases
from .results import Line, case_key

OURS = "onepass-"
RULE_NAMES = {name: found.__name__ for name, found in classes().items()}
RULE_NAMES["sgd"] = "SGD with momentum"


def newest(lines: list[Line]) -> list[Line]:
    """The newest line of each device, case and provider.

    The device that was measured last comes first; its lines are in the order of first appearance.
    """
    found: dict[tuple[Any, ...], Line] = {}
    last: dict[str, str] = {}
    for line in lines:
        key = (line["device"], *case_key(line), line["provider"])
        if key not in found or line["date"] >= found[key]["date"]:
            found[key] = line
        last[line["device"]] = max(line["date"], last.get(line["device"], ""))
    return sorted(found.values(), key=lambda line: last[line["device"]], reverse=True)


def by_device(lines: list[Line]) -> dict[str, list[Line]]:
    """The lines of each device, in the order of first appearance."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["device"], []).append(line)
    return found


def archived(lines: list[Line]) -> set[str]:
    """The devices that a newer one replaces.

    A CPU is replaced by one with the same instruction set that was measured later. A GPU is
    replaced by none.

    Args:
        lines: the result of :func:`newest`.
    """
    seen: set[str] = set()
    found: set[str] = set()
    for device, own in by_device(lines).items():
        kind = device if own[0]["cuda"] else device.rpartition(", ")[2]
        if kind in seen:
            found.add(device)
        seen.add(kind)
    return found


def slug(device: str) -> str:
    """The name of the page of a device: "NVIDIA H200" -> "nvidia-h200"."""
    short = re.sub(r"\(R\)|\bProcessor\b|\d+ of \d+ threads", "", device)
    return "-".join(re.findall(r"[a-z0-9]+", short.lower()))


def cases_of(lines: list[Line]) -> list[list[Line]]:
    """The lines of each case; known cases are in the order of cases.py."""
    groups: dict[tuple[str, str, str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault(case_key(line), []).append(line)
    order = {case.key: i for i, case in enumerate([*cpu_cases(), *gpu_cases()])}
    return [groups[key] for key in sorted(groups, key=lambda key: order.get(key, len(order)))]


def formats(line: Line) -> str:
    """The formats of a case in words."""
    if line["param_dtype"] == line["states"] and line["weights"] == "native":
        return str(line["states"]) if line["states"] == "fp32" else f"all {line['states']}"
    kept = "" if line["weights"] == "native" else f" {line['weights']}"
    return f"{line['param_dtype']}{kept} weights, {line['states']} states"


def title(line: Line) -> str:
    """A case in words."""
    return f"{RULE_NAMES.get(line['rule'], line['rule'])}, {formats(line)}, {line['list']}"


def steps(case: list[Line]) -> list[Line]:
    """The lines of a case without the limits (copies), sorted by median time."""
    return sorted(
        (line for line in case if line["provider"] not in LIMITS), key=lambda x: x["ms"]["p50"]
    )


def ours_of(case: list[Line]) -> Line | None:
    """The line of onepass in a case; that of the CUDA library before that of Triton."""
    found = [line for line in case if line["provider"].startswith(OURS)]
    return min(found, key=lambda line: line["provider"], default=None)


def per_billion(line: Line) -> float:
    """Median time of a step in milliseconds per billion parameters."""
    return float(line["ms"]["p50"] / line["numel"] * 1e9)


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
