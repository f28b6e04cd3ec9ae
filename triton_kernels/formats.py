"""The table of formats in Triton and the counter-based random bits, as :mod:`onepass.formats` and
:mod:`onepass.numerics.random_bits` specify them.

A format decodes stored elements to fp32 and encodes fp32 elements; see floats.py and blocks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from . import blocks, floats

# --- random bits -----------------------------------------------------------------------------


@triton.jit
def splitmix64(z):
    """The output function of SplitMix64."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_stream(seed, step, param_id):
    """The stream of one parameter at one step. The arguments are int64 scalars of the tables."""
    z = splitmix64(seed.to(tl.uint64)) ^ step.to(tl.uint64)
    return splitmix64(splitmix64(z) ^ param_id.to(tl.uint64))


@triton.jit
def random_bits(stream, index, offsets, WORD: tl.constexpr):
    """32 random bits for each element index + offsets; no multiple of 2^32 may be in between."""
    index = index.to(tl.uint64)
    key = splitmix64(stream ^ ((index >> 32) | (WORD << 32)))
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    x = (index.to(tl.uint32) + offsets.to(tl.uint32)) * 0x9E3779B9 + k0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15) ^ k1) * 0x846CA68B


# --- formats ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A format as the sweep takes it, a constexpr.

    Attributes:
        name: name in error messages and in the names of compiled kernels.
        element: Triton type of a stored element.
        decode: (codes, extra, root, maps) -> fp32 elements. Codes of 16 bits are the upper halves
            of 32-bit words, and so are companions.
        encode: (fp32 elements, random, root, maps) -> (codes, extra).
        stochastic: whether encode reads random, 16 bits per element.
        extra: type of the second tensor (scales of blocks, or companions of weights); None if the
            format has none.
        block: number of elements that share one element of extra.
        packed: number of codes in a stored element.
        position: the position of the 16 random bits that a weight in this format draws, if it does
            not depend on the states; see onepass.numerics.random_bits.bits_from.
        root: (stored elements, scales) -> the unit of relative first moments; None if the format
            has no such unit.
    """

    name: str
    element: tl.dtype
    decode: Any
    encode: Any
    stochastic: bool = False
    extra: tl.dtype | None = None
    block: int = 1
    packed: int = 1
    position: int | None = None
    root: Any = None

    @property
    def functions(self) -> list[Any]:
        """The Triton functions of the format."""
        return [self.decode, self.encode, *([self.root] if self.root else [])]


def _mx(name: str, kind: str, **options: Any) -> Format:
    decode, encode = (getattr(blocks, f"{way}_{name}_{kind}") for way in ("decode", "encode"))
    scales = {"extra": tl.uint8, "block": blocks.MX_BLOCK.value}
    return Format(f"{name}-{kind}", tl.uint8, decode, encode, stochastic=True, **scales, **options)


def _dynamic(sign: str) -> Format:
    decode, encode = (getattr(blocks, f"{way}_dynamic_{sign}") for way in ("decode", "encode"))
    scales = {"extra": tl.float32, "block": blocks.DYNAMIC_BLOCK.value}
    return Format(f"dynamic8-{sign}", tl.uint8, decode, encode, **scales)


def _companion(name: str, extra: tl.dtype, **options: Any) -> Format:
    decode, encode = (getattr(floats, f"{way}_{name}") for way in ("decode", "encode"))
    return Format(name, tl.uint16, decode, encode, extra=extra, **options)


# Formats that depend only on their number (onepass/formats/<name>.py).
FORMATS = {
    0: Format("fp32", tl.float32, floats.decode_fp32, floats.encode_fp32),
    1: Format("bf16", tl.uint16, floats.decode_bf16, floats.encode_bf16),
    2: Format("fp16", tl.uint16, floats.decode_fp16, floats.encode_fp16),
    3: Format("bf16sr", tl.uint16, floats.decode_bf16, floats.encode_bf16_stochastic, True),
    4: Format("fp16sr", tl.uint16, floats.decode_fp16, floats.encode_fp16_stochastic, True),
    8: _companion("kahan_bf16", tl.uint16),
    9: _companion("kahan_fp16", tl.uint16),
    10: _companion("master_bf16", tl.float32),
    11: _companion("master_fp16", tl.float32),
    12: _companion("split16", tl.uint16),
    # split8 needs 8 bits and shares the lowest bits of slot 0, because they hardly affect the
    # rounding of that state.
    13: _companion("split8", tl.uint8, stochastic=True, position=0),
}

_DYNAMIC = {sign: _dynamic(sign) for sign in ("signed", "unsigned")}
_MX8 = {kind: _mx("mx8", kind) for kind in ("first", "second")}
_MX4 = {kind: _mx("mx4", kind, packed=2) for kind in ("first", "relative")}
_MX4["second"] = _mx("mx4", "second", packed=2, root=blocks.root_mx4)

# Formats of states that depend on the kind of the moment too: number -> (kind, slot) -> format.
MOMENT_FORMATS = {
    5: lambda kind, slot: _MX8["second" if kind == "second" else "first"],
    6: lambda kind, slot: _MX4[kind],
    # As in bitsandbytes, slot 0 is signed, even for the second moments of Adagrad and RMSprop.
    7: lambda kind, slot: _DYNAMIC["unsigned" if kind == "second" and slot else "signed"],
}


def state_format(code: int, kind: str, slot: int) -> Format:
    """The format of the state of a rule, by the number of the format and the kind of the state."""
    return MOMENT_FORMATS[code](kind, slot) if code in MOMENT_FORMATS else FORMATS[code]
