"""Runs straight-line PTX in NumPy, on one number per lane."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

Words = np.ndarray  # uint32, one per lane


def run(text: str, inputs: list[Words], outputs: int) -> tuple[list[Words], np.ndarray]:
    """Runs the assembly of inline_asm_elementwise.

    A branch must be forward: the lanes that take it skip the instructions up to the label.
    Approximate operations return the nearest number or, at random, one of its neighbours.

    Args:
        text: the assembly; $0 and following are the outputs, the inputs come after them.
        inputs: one array per input.
        outputs: the number of outputs.

    Returns:
        The outputs, and for each lane whether it took no branch.
    """
    lanes = inputs[0].shape
    words = {f"${outputs + k}": value for k, value in enumerate(inputs)}
    active, stayed = np.ones(lanes, bool), np.ones(lanes, bool)
    for line in filter(None, re.split(r"[;\n{}]+", text)):
        if line.startswith(".reg"):
            continue
        if line.endswith(":"):
            active = np.ones(lanes, bool)
        elif branch := re.fullmatch(r"@!(\w+) bra \w+", line):
            active = stayed = words[branch[1]].astype(bool)
        else:
            name, _, rest = line.partition(" ")
            target, *sources = re.split(r",\s*", rest)
            with np.errstate(all="ignore"):
                found = OPERATIONS[name](*(_operand(source, words, lanes) for source in sources))
            words[target] = np.where(active, found, words.get(target, 0)).astype(np.uint32)
    return [words[f"${k}"] for k in range(outputs)], stayed


def _operand(text: str, words: dict[str, Words], lanes: tuple[int, ...]) -> Words:
    if text in words:
        return words[text]
    if text.startswith("0f"):
        return np.full(lanes, int(text[2:], 16), np.uint32)
    return np.full(lanes, int(text, 0) & 0xFFFFFFFF, np.uint32)


def _floats(operation: Callable[..., np.ndarray]) -> Callable[..., Words]:
    """An operation on fp32 as one on bits."""
    return lambda *x: operation(*(v.view(np.float32) for v in x)).astype(np.float32).view(np.uint32)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once: float64 rounded to odd has enough bits to be rounded again."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0) & np.isfinite(error)
    return (bits + np.where(even, np.where((error > 0) == (total > 0), 1, -1), 0)).view(np.float64)


def _approximate(exact: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    random = np.random.default_rng(0)

    def operation(x: np.ndarray) -> np.ndarray:
        x = np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(np.float64)
        bits = exact(x).astype(np.float32).view(np.uint32)
        near = bits + random.integers(-1, 2, x.shape).astype(np.uint32)
        values = near.view(np.float32)
        ordinary = np.isfinite(values) & (np.abs(values) >= 2.0**-126)
        return np.where(ordinary, values, bits.view(np.float32))

    return operation


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    chosen = [np.uint64(8) * (int(selector.flat[0]) >> 4 * k & 7) for k in range(4)]
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    parts = [(both >> shift & np.uint64(255)) << np.uint64(8 * k) for k, shift in enumerate(chosen)]
    return np.bitwise_or.reduce(parts).astype(np.uint32)


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda x: x,
    "mov.f32": lambda x: x,
    "add.u32": np.add,
    "min.u32": np.minimum,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "not.b32": np.invert,
    "prmt.b32": _prmt,
    "add.rn.f32": _floats(np.add),
    "mul.rn.f32": _floats(np.multiply),
    "div.rn.f32": _floats(np.divide),
    "sqrt.rn.f32": _floats(np.sqrt),
    "neg.f32": _floats(np.negative),
    "abs.f32": _floats(np.abs),
    "fma.rn.f32": _floats(_fma),
    "rcp.approx.ftz.f32": _floats(_approximate(lambda x: 1 / x)),
    "rsqrt.approx.ftz.f32": _floats(_approximate(lambda x: 1 / np.sqrt(x))),
    "setp.lt.u32": np.less,
    "setp.gtu.or.f32": lambda x, y, p: ~(x.view(np.float32) <= y.view(np.float32)) | p.astype(bool),
}
