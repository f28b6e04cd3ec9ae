"""`onepass bench`: time one optimizer step, other libraries, and a memory copy of equal bytes."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from onepass.suggestions import did_you_mean
from onepass_tools import UsageError

if TYPE_CHECKING:
    from onepass_tools.benchmark.cases import Case
    from onepass_tools.benchmark.devices import Device
    from onepass_tools.benchmark.param_lists import ParamList

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `onepass bench`."""
    parser.add_argument(
        "--rule",
        default="adamw",
        help="a class of onepass in lower case, or module:Class for a rule of your own "
        "(default: adamw)",
    )
    parser.add_argument("--states", default="fp32", help="format of the states (default: fp32)")
    parser.add_argument(
        "--weights", default="native", help="format of the weights (default: native)"
    )
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help="dtype of weights and gradients: fp32, bf16 or fp16 (default: fp32 if --weights is "
        "native, else bf16)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--numel",
        metavar="SIZE",
        help="step over one tensor with this number of elements, for example 100M or 1.5B "
        "(default: 50M)",
    )
    size.add_argument(
        "--list",
        metavar="NAME",
        help="step over the parameters of this model, for example gpt2 or resnet50",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu or cuda (default: auto, a GPU if there is one)"
    )
    parser.add_argument(
        "--providers",
        metavar="NAMES",
        help="run only these providers, separated by commas; * and ? are wildcards",
    )
    parser.add_argument("--samples", metavar="N", help="timed steps per provider")


def run(args: argparse.Namespace) -> int:
    """Measure and print; return 0, or 1 if a step of onepass has a wrong result.

    Raises UsageError, before any measurement, if the case cannot be measured.
    """
    case = _case(args)
    samples = None if args.samples is None else size(args.samples, "--samples")
    device = _device(args.device)

    from onepass_tools.benchmark import table, timing
    from onepass_tools.benchmark.providers import all_providers, find

    try:
        chosen = find(all_providers(device.type, ":" in case.rule), args.providers)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # Other libraries print during import and compilation; stdout must contain only the table.
    with contextlib.redirect_stdout(sys.stderr):
        missing = [(p.name, why) for p in chosen if (why := p.unavailable(device.type))]
        available = [p for p in chosen if p.name not in dict(missing)]
        _check_memory(case, device)
        outcome = timing.run_case(case, available, samples, device=device)
    print(f"{case.name}: {case.list.numel:,} elements, {case.bytes / 1e6:,.3f} MB per step")
    print(f"{device.name}\n{table.LEGEND}\n\n{table.HEADER}")
    print("\n".join(table.rows(outcome)))
    reasons = [*outcome.skipped, *missing]
    if reasons:
        print("\nnot measured")
    for name, why in reasons:
        print(f"{name:<18} {why}")
    return int(outcome.ours_failed)


def size(text: str, option: str) -> int:
    """Parse an integer with an optional unit: 2500, 100M, 1.5B, 1e6.

    Raises UsageError if the text is not such a number, or the number is below 1.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbgt]?)", text.lower())
    if found is None:
        raise UsageError(f"{option} must be a size such as 2500, 100M or 1.5B; got {text!r}")
    from decimal import Decimal

    number = Decimal(re.sub("[_,]", "", found[1])) * UNITS[found[2]]
    if number != int(number) or number < 1:
        raise UsageError(f"{option} must be a whole number of at least 1; got {text!r}")
    return int(number)


def _one_of(value: str, names: Iterable[str], option: str) -> str:
    known = list(names)
    if value not in known:
        meant = did_you_mean(value, known)
        raise UsageError(f"{option} must be one of {', '.join(known)}; got {value!r}{meant}")
    return value


def _case(args: argparse.Namespace) -> Case:
    from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
    from onepass_tools.benchmark.cases import DTYPES, OPTIONS, Case

    if ":" in args.rule:
        _add_custom(args.rule)
    rule = _one_of(args.rule, OPTIONS, "--rule")
    states = _one_of(args.states, STATE_FORMATS, "--states")
    weights = _one_of(args.weights, WEIGHT_FORMATS, "--weights")
    default = "fp32" if weights == "native" else "bf16"
    dtype = _one_of(args.dtype or default, DTYPES, "--dtype")
    codes = WEIGHT_FORMATS[weights].codes
    if DTYPES[dtype] not in codes:
        served = [name for name, found in DTYPES.items() if found in codes]
        raise UsageError(f"--weights {weights} needs --dtype {' or '.join(served)}; got {dtype}")
    return Case(rule, dtype, states, _params(args), weights)


def _add_custom(name: str) -> None:
    """Makes the class ``module:Class`` a rule of the benchmark."""
    from onepass.memory.models import load
    from onepass.memory.variants import optimizer_class
    from onepass_tools.benchmark.cases import add_class

    try:
        made = load(name)
    except ValueError as error:
        raise UsageError(f"--rule {error}") from None
    found = optimizer_class(made)
    if found is None:
        raise UsageError(f"--rule {name} must be an optimizer class of onepass, not {made!r}")
    add_class(name, found)


def _params(args: argparse.Namespace) -> ParamList:
    from onepass_tools.benchmark.param_lists import NAMED, one

    if args.list is not None:
        return NAMED[_one_of(args.list, NAMED, "--list")]()
    return one(size(args.numel or "50M", "--numel"))


def _device(name: str) -> Device:
    from onepass_tools.benchmark.devices import DEVICES

    _one_of(name, ["auto", *DEVICES], "--device")
    if name == "auto":
        name = "cpu" if DEVICES["cuda"].unavailable() else "cuda"
    if why := DEVICES[name].unavailable():
        raise UsageError(f"--device {name}: {why}")
    return DEVICES[name]


def _check_memory(case: Case, device: Device) -> None:
    """Raises UsageError if one optimizer, the gradients and the copy do not fit in memory."""
    from onepass_tools.benchmark.timing import memory_of

    free, needed = device.free(), memory_of(case, device)
    if free is not None and needed > free:
        raise UsageError(
            f"{case.list.name} needs about {needed / 1e9:,.1f} GB for one optimizer and the copy; "
            f"{free / 1e9:,.1f} GB are free on {device.type}"
        )
