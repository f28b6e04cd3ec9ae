"""Words of 32 bits from and to codes of 8 and 16 bits.

On NVIDIA GPUs one instruction (``prmt``) selects any four bytes of two words. LLVM and ptxas do not
find it in the shifts and masks that select them elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import on_nvidia

UPPER = tl.constexpr(0xFFFF0000)
_SIGN = tl.constexpr(0x80000000)

PAIR = tl.constexpr("prmt.b32 $0, $1, $2, 0x7632;")
UPPER_BYTES = tl.constexpr(
    """prmt.b32 $0, $4, 0, 0x0444;
prmt.b32 $1, $4, 0, 0x1444;
prmt.b32 $2, $4, 0, 0x2444;
prmt.b32 $3, $4, 0, 0x3444;"""
)
_LOWER_BYTES = """prmt.b32 a, $1, $2, 0x0040;
prmt.b32 b, $3, $4, 0x0040;
prmt.b32 a, a, b, 0x5410;
"""
_SIGNS = """prmt.b32 b, $5, $6, 0x0073;
prmt.b32 c, $7, $8, 0x0073;
prmt.b32 b, b, c, 0x5410;
and.b32 b, b, 0x80808080;
or.b32 a, a, b;
"""
# {finite} is a byte per code: 0xFF in finite blocks, 0 in the others.
_FINITE = """and.b32 a, a, {finite};
not.b32 b, {finite};
and.b32 b, b, 0x04040404;
or.b32 $0, a, b;
"""
BYTES = tl.constexpr("{\n.reg .b32 a, b;\n" + _LOWER_BYTES + _FINITE.format(finite="$5") + "}")
SIGNED_BYTES = tl.constexpr(
    "{\n.reg .b32 a, b, c;\n" + _LOWER_BYTES + _SIGNS + _FINITE.format(finite="$9") + "}"
)


@triton.jit
def pair_of(low, high):
    """Words with the upper halves of two words."""
    if on_nvidia():
        pairs = tl.inline_asm_elementwise(
            PAIR, "=r,r,r", [low, high], tl.uint32, is_pure=True, pack=1
        )
    else:
        pairs = (low >> 16) | (high & UPPER)
    return pairs


@triton.jit
def upper_bytes(codes):
    """Words with bytes as their uppermost bits."""
    if on_nvidia():
        words = tl.inline_asm_elementwise(
            UPPER_BYTES, "=&r,=&r,=&r,=&r,r", [codes], tl.uint32, is_pure=True, pack=4
        )
    else:
        words = codes.to(tl.uint32) << 24
    return words


@triton.jit
def code_bytes(code, finite):
    """The bytes of codes of 8 bits without a sign; 4 where the block is not finite."""
    if on_nvidia():
        found = tl.inline_asm_elementwise(
            BYTES, "=r,r,r,r,r,r", [code, tl.where(finite, 255, 0).to(tl.uint8)], tl.uint8,
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        found = tl.where(finite, code, 4).to(tl.uint8)
    return found


@triton.jit
def signed_code_bytes(code, bits, finite):
    """The bytes of codes of 7 bits below the signs of bits; 4 where the block is not finite."""
    if on_nvidia():
        found = tl.inline_asm_elementwise(
            SIGNED_BYTES, "=r,r,r,r,r,r,r,r,r,r",
            [code, bits, tl.where(finite, 255, 0).to(tl.uint8)], tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        found = tl.where(finite, code | ((bits & _SIGN) >> 24), 4).to(tl.uint8)
    return found
