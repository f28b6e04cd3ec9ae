"""Correctly rounded square roots and quotients.

For an NVIDIA GPU the compiler expands each of these operations to a few fused operations, a test of
the operands and a branch around a subroutine. A thread then computes its elements one after the
other. The assembly of this file has the same fused operations, but tests the operands of four
elements at once, and computes all four again with ``sqrt.rn`` and ``div.rn`` if one of them is out
of range. The interpreter and other GPUs run ``tl.sqrt_rn`` and ``tl.div_rn``.

The results of the fused operations are correctly rounded if no intermediate result overflows or is
below the normal numbers, and the remainders are exact. It is sufficient that every dividend and
radicand is 0 or at least 2^-101, that divisors are between 2^-100 and 2^21, and that dividends are
at most 2^27.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import on_nvidia

PACK = tl.constexpr(4)  # elements per piece of assembly
LEAST = 2 * 0x0D000000 - 1  # twice the bits of 2^-101, less 1; for 0 this is the largest integer
# Bounds of the sum of the magnitudes of dividends and radicands, and of dividends and divisors.
MOST = tl.constexpr(2.0**27)
MOST_DIVISOR = tl.constexpr(2.0**21)
LEAST_EPS = tl.constexpr(2.0**-100)
MOST_EPS = tl.constexpr(2.0**20)
_LARGEST = "0f7F7FFFFF"

# Set in the flags of built-in rules if a format also takes the root of the second moment. The root
# is then computed by a piece of assembly of its own, which the compiler shares with the format.
SHARED_ROOT = tl.constexpr(1 << 16)

# The operations for element {j}. 2^-126 gives 0 a finite inverse root; it is less than half of the
# last bit of other numbers.
_ROOT = """
add.rn.f32 t{j}, {s}, 0f00800000;
rsqrt.approx.ftz.f32 i{j}, t{j};
mul.rn.f32 r{j}, {s}, i{j};
mul.rn.f32 i{j}, i{j}, 0f3F000000;
neg.f32 t{j}, r{j};
fma.rn.f32 t{j}, t{j}, r{j}, {s};
fma.rn.f32 r{j}, t{j}, i{j}, r{j};
"""
_INVERSE = "rcp.approx.ftz.f32 i{j}, d{j};\n"
_NEWTON = """
neg.f32 t{j}, d{j};
fma.rn.f32 t{j}, t{j}, i{j}, 0f3F800000;
fma.rn.f32 i{j}, i{j}, t{j}, i{j};
"""
# The last two negations keep the sign of a dividend that is 0.
_PRODUCT = """
mul.rn.f32 q{j}, {x}, i{j};
neg.f32 t{j}, {x};
fma.rn.f32 t{j}, d{j}, q{j}, t{j};
neg.f32 t{j}, t{j};
fma.rn.f32 q{j}, t{j}, i{j}, q{j};
"""
_QUOTIENT = _INVERSE + _NEWTON + _PRODUCT
_ADD_EPS = "add.rn.f32 d{j}, r{j}, {eps};\n"


def _each(text: str, **operands: int) -> str:
    """The text for every element. operands: name in the text -> position among the operands of
    the assembly, of which the results are the first."""
    return "".join(
        text.format(j=j, **{name: f"${k * PACK.value + j}" for name, k in operands.items()})
        for j in range(PACK.value)
    )


def _notes(least: list[int], most: list[int]) -> str:
    """The operations that find the least and the sum of the magnitudes of operands.

    Args:
        least, most: positions of the operands, as in _each.
    """
    lines = []
    for number, operand in enumerate(_operands(least)):
        lines += [f"mov.b32 b0, {operand};", "add.u32 b0, b0, b0;", "add.u32 b0, b0, -1;"]
        lines += ["min.u32 least, least, b0;" if number else "mov.b32 least, b0;"]
    for number, operand in enumerate(_operands(most)):
        lines += [f"abs.f32 t0, {operand};"]
        lines += ["add.rn.f32 sum, sum, t0;" if number else "mov.f32 sum, t0;"]
    return "\n".join(lines)


def _operands(positions: list[int]) -> list[str]:
    return [f"${k * PACK.value + j}" for k in positions for j in range(PACK.value)]


def _assembly(quick: str, exact: str, notes: str, most: str, result: str) -> tl.constexpr:
    """Assembly with two ways to a result.

    Args:
        quick: the fused operations.
        exact: the operations of the compiler, which replace the result if an operand is out of
            range.
        notes: the operations on the operands that find least and sum.
        most: the bound of the sum; a NaN is above it.
        result: name of the registers of the result.
    """
    results = "".join(f"mov.f32 ${j}, {result}{j};\n" for j in range(PACK.value))
    return tl.constexpr(
        f"""{{
.reg .f32 t<4>, i<4>, r<4>, d<4>, q<4>, sum;
.reg .b32 b0, least;
.reg .pred outside;
{quick}{notes}
setp.lt.u32 outside, least, {LEAST};
setp.gtu.or.f32 outside, sum, {most}, outside;
@!outside bra DONE;
{exact}DONE:
{results}}}"""
    )


def _constraints(inputs: int) -> tl.constexpr:
    """Results are written after all inputs are read."""
    return tl.constexpr(",".join(["=f"] * PACK.value + ["f"] * (PACK.value * inputs)))


ROOT = _assembly(
    _each(_ROOT, s=1),
    _each("sqrt.rn.f32 r{j}, {s};\n", s=1),
    _notes([1], [1]),
    _LARGEST,
    "r",
)


def _division(operations: str) -> tl.constexpr:
    """Operands: the dividend, the divisor, the bound of the sum."""
    return _assembly(
        _each("mov.f32 d{j}, {d};\n", d=2) + _each(operations, x=1),
        _each("div.rn.f32 q{j}, {x}, d{j};\n", x=1),
        _notes([1], [1, 2]),
        f"${3 * PACK.value}",
        "q",
    )


QUOTIENT = _division(_QUOTIENT)
# For divisors with three significant bits: 2^e times 1, 1.25, 1.5 or 1.75. A quotient by such a
# number is at least 1/14 of the distance of two floats away from the middle between them, because
# 4, 5, 6 or 7 times the middle has 25 bits or more. The remainder is exact, so that an error of one
# unit in the last place of the inverse moves the result by 2^-22 of that distance.
BY_CODE = _division(_INVERSE + _PRODUCT)
# Operands: the dividend, the radicand, eps, the bound of the sum.
OVER_ROOT = _assembly(
    _each(_ROOT, s=2) + _each(_ADD_EPS, eps=3) + _each(_QUOTIENT, x=1),
    _each("sqrt.rn.f32 r{j}, {s};\n" + _ADD_EPS + "div.rn.f32 q{j}, {x}, d{j};\n", x=1, s=2, eps=3),
    _notes([1, 2], [1, 2]),
    f"${4 * PACK.value}",
    "q",
)
# One element, with operands that are in the range.
IN_RANGE = tl.constexpr(
    "{\n.reg .f32 t0, i0, d0, q0;\nmov.f32 d0, $2;\n"
    + _QUOTIENT.format(j=0, x="$1")
    + "mov.f32 $0, q0;\n}"
)
_ONE, _THREE, _FOUR = _constraints(1), _constraints(3), _constraints(4)


@triton.jit
def root_of(square):
    """sqrt(square)."""
    if on_nvidia():
        root = tl.inline_asm_elementwise(ROOT, _ONE, [square], tl.float32, is_pure=True, pack=PACK)
    else:
        root = tl.sqrt_rn(square)
    return root


@triton.jit
def divide(x, d, most, ASSEMBLY: tl.constexpr):
    """x / d on an NVIDIA GPU. The fused operations are used if the magnitudes of x and d have a sum
    of at most most, a scalar; d must then be at least 2^-100."""
    return tl.inline_asm_elementwise(
        ASSEMBLY, _THREE, [x, d, most], tl.float32, is_pure=True, pack=PACK
    )


@triton.jit
def over_code(x, d):
    """x / d, for d >= 2^-100 with three significant bits, or a NaN or infinity."""
    return divide(x, d, MOST_DIVISOR, BY_CODE) if on_nvidia() else tl.div_rn(x, d)


@triton.jit
def in_range(x, d):
    """x / d, for operands that are in the range; any number for other operands."""
    if on_nvidia():
        quotient = tl.inline_asm_elementwise(
            IN_RANGE, "=f,f,f", [x, d], tl.float32, is_pure=True, pack=1
        )
    else:
        quotient = tl.div_rn(x, d)
    return quotient


@triton.jit
def over_root(x, square, eps, FLAGS: tl.constexpr, IN_SQRT: tl.constexpr = False):
    """x / (sqrt(square) + eps), or x / sqrt(square + eps) if IN_SQRT.

    eps is a scalar. FLAGS: the flags of the rule.
    """
    if on_nvidia():
        # A number above 2^-100 that is added to the root, or to the radicand, makes every divisor
        # large enough. Another number makes the bound negative, which no sum is below.
        covered = (eps >= LEAST_EPS) & (eps <= MOST_EPS)
        if IN_SQRT or FLAGS & SHARED_ROOT:
            d = root_of(square + eps) if IN_SQRT else root_of(square) + eps
            quotient = divide(x, d, tl.where(covered, MOST_DIVISOR, -1.0), QUOTIENT)
        else:
            most = tl.where(covered, MOST, -1.0)
            quotient = tl.inline_asm_elementwise(
                OVER_ROOT, _FOUR, [x, square, eps, most], tl.float32, is_pure=True, pack=PACK
            )
    else:
        root = tl.sqrt_rn(square + eps) if IN_SQRT else tl.sqrt_rn(square) + eps
        quotient = tl.div_rn(x, root)
    return quotient
