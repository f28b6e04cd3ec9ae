"""``python -m bench.ladder``: compares the results of the rungs, then times them, interleaved."""

from __future__ import annotations

import sys
from collections.abc import Callable

from onepass_tools.benchmark.cases import Case
from onepass_tools.benchmark.devices import Device
from onepass_tools.benchmark.param_lists import ParamList, gpt2, llama3, many, one

from .. import results
from ..options import device_of, keep, parser_of
from ..results import Line
from . import rungs
from .rungs import Rung

ODD = ParamList("odd", ((3, 5), (1,), (9000,), (256,), (17_000,)))
"""The list on which rungs are checked: it has full and partial chunks and tiles."""

Ladder = tuple[str, Case, Callable[[ParamList], list[Rung]]]


def _ladders(device: str) -> list[Ladder]:
    """The ladders of a device: (name, case that is timed, function that makes the rungs)."""
    if device == "cuda":
        from . import gpu

        lists = [llama3(16), many(2000, 256)]
        return [
            (f"AdamW, fp32, {params.name}", Case("adamw", "fp32", "fp32", params), gpu.rungs)
            for params in lists
        ]
    from . import cpu

    bf16 = one(32 * cpu.UNIT * 16)
    found: list[Ladder] = [
        (f"AdamW, fp32, {params.name}", Case("adamw", "fp32", "fp32", params), cpu.list_rungs)
        for params in (gpt2(), many(2000, 256))
    ]
    how = f"{cpu.THREADS} threads, {cpu.isas()[-1]}"
    name = f"AdamW, all bf16, {bf16.numel:,} elements, {how}"
    case = Case("adamw", "bf16", "bf16", bf16)
    return [*found, (name, case, lambda params: cpu.tile_rungs(params.numel))]


def run(ladder: Ladder, device: Device, samples: int) -> list[Line]:
    """Checks a ladder, times it and returns its result lines.

    Raises:
        RuntimeError: the rungs compute different weights, or a rung cannot be built on this
            machine.
    """
    name, case, make = ladder
    small = ODD if case.dtype == "fp32" else one(3 * 65536)
    env = results.environment(device.type)
    rungs.check(lambda: make(small), steps=1 if device.type == "cuda" else 2)
    found = make(case.list)
    rungs.measure(found, device, samples, warm=not case.beyond_cache)
    return rungs.lines(env, found, name, case.bytes)


def main(argv: list[str] | None = None) -> int:
    """Runs the ladders.

    Returns:
        0 on success; 1 if the rungs of a ladder differ or cannot be built; 2 on wrong usage or if
        the device is missing.
    """
    parser = parser_of("ladder", __doc__, 9, "timed steps per rung (default 9)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run only the ladders whose name contains TEXT"
    )
    args = parser.parse_args(argv)
    device = device_of(parser, args)
    if device is None:
        return 2
    chosen = [ladder for ladder in _ladders(device.type) if args.only in ladder[0]]
    if not chosen:
        parser.error(f"--only: no ladder has {args.only!r} in its name")
    status = 0
    for ladder in chosen:
        try:
            lines = run(ladder, device, args.samples)
        except RuntimeError as error:
            print(f"bench.ladder: {ladder[0]}: {error}", file=sys.stderr)
            status = 1
            continue
        finally:
            if device.type == "cpu":
                from .cpu import restore

                restore()
        print("\n".join(rungs.table(lines)), flush=True)
        keep(args, "ladder", lines)
        device.release()
    return status


if __name__ == "__main__":
    sys.exit(main())
