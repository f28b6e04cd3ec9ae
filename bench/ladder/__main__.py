"""``python -m bench.ladder``: checks the rungs against each other, then times them in turns."""

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
"""What rungs are checked on: chunks and tiles, whole and not."""

Ladder = tuple[str, Case, Callable[[ParamList], list[Rung]]]


def _ladders(device: str) -> list[Ladder]:
    """(name, what is timed, how to make its rungs)."""
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
    """Checks a ladder and times it.

    Raises:
        RuntimeError: rungs do not come to the same weights, or one cannot be built here.
    """
    name, case, make = ladder
    small = ODD if case.dtype == "fp32" else one(3 * 65536)
    env = results.environment(device.type)
    rungs.check(lambda: make(small), steps=1 if device.type == "cuda" else 2)
    found = make(case.list)
    rungs.measure(found, device, samples, warm=not case.beyond_cache)
    return rungs.lines(env, found, name, case.bytes)


def main(argv: list[str] | None = None) -> int:
    """Measures; 0 done, 1 rungs that differ, 2 wrong usage or no such device."""
    parser = parser_of("ladder", __doc__, 9, "steps timed of each")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="ladders with this in their name"
    )
    args = parser.parse_args(argv)
    device = device_of(parser, args)
    if device is None:
        return 2
    chosen = [ladder for ladder in _ladders(device.type) if args.only in ladder[0]]
    if not chosen:
        parser.error(f"no ladder has {args.only!r} in its name")
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
