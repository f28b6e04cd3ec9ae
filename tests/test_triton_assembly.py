"""The PTX that the Triton kernels contain for NVIDIA GPUs, run in NumPy.

The interpreter of Triton does not run it.
"""

from __future__ import annotations

import numpy as np
import pytest

from .support import ptx

roots = pytest.importorskip("onepass.triton_kernels.roots")
packing = pytest.importorskip("onepass.triton_kernels.packing")

PACK = roots.PACK.value
LANES = 20_000
ENDS = [0x0, 0x80000000, 0x1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]
# The bounds of dividends and radicands, and their neighbours.
BOUNDS = [0x0C800000, 0x0CFFFFFF, 0x0D000000, 0x0D000001, 0x4CFFFFFF, 0x4D000000, 0x4D000001]
SPECIAL = np.array([*ENDS, *BOUNDS], np.uint32)


def numbers(seed, least=0, most=255, special=0.0, signed=True):
    """The bits of numbers with biased exponents from least to most; a share of them is special."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 23, (PACK, LANES)) | (
        random.integers(least, most, (PACK, LANES)) << 23
    )
    # Some have few significant bits, with which quotients and roots are near ties.
    bits = np.where(random.random(bits.shape) < 0.3, bits & ~0x7FFFF, bits)
    bits |= random.integers(0, 2, bits.shape) << 31 if signed else 0
    chosen = random.random(bits.shape) < special
    return list(np.where(chosen, random.choice(SPECIAL, bits.shape), bits).astype(np.uint32))


def alike(value):
    """The bits of one number for all elements."""
    return [np.full(LANES, np.float32(value).view(np.uint32))] * PACK


def assert_same(found, expected):
    found, expected = np.stack(found).view(np.float32), np.stack(expected)
    nan = np.isnan(expected)
    assert np.isnan(found[nan]).all()
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def floats(words):
    return [word.view(np.float32) for word in words]


# Exponents from 2^-101 to 2^24, and all exponents.
INSIDE, ANY = {"least": 26, "most": 151}, {"special": 0.05}


@pytest.mark.parametrize("eps", [1e-8, 2.0**-100, 1.0, 0.0, 1e-35, 1e30, -1.0, np.nan])
@pytest.mark.parametrize("span", [INSIDE, ANY, {"most": 40, "special": 0.1}], ids=str)
def test_a_quotient_by_a_root_is_correctly_rounded(eps, span):
    x, square = numbers(0, **span), numbers(1, **span, signed=span is ANY)
    covered = 2.0**-100 <= eps <= 2.0**20
    most = alike(roots.MOST.value if covered else -1.0)
    inputs = [*x, *square, *alike(eps), *most]
    found, exact = ptx.run(roots.OVER_ROOT.value, inputs, PACK)
    with np.errstate(all="ignore"):
        expected = [
            a / (np.sqrt(s) + np.float32(eps))
            for a, s in zip(floats(x), floats(square), strict=True)
        ]
    assert_same(found, expected)
    assert exact.all() if not covered else not exact.any() if span is INSIDE else exact.any()


@pytest.mark.parametrize("span", [INSIDE, ANY], ids=str)
def test_roots_are_correctly_rounded(span):
    square = numbers(2, **span, signed=span is ANY)
    found, exact = ptx.run(roots.ROOT.value, square, PACK)
    with np.errstate(all="ignore"):
        assert_same(found, [np.sqrt(s) for s in floats(square)])
    assert not exact.any() if span is INSIDE else exact.any()


@pytest.mark.parametrize("span", [{"least": 26, "most": 145}, ANY], ids=str)
def test_quotients_are_correctly_rounded(span):
    x, d = numbers(3, **span), numbers(4, least=27, most=255 if span is ANY else 145, signed=False)
    found, exact = ptx.run(roots.QUOTIENT.value, [*x, *d, *alike(roots.MOST_DIVISOR.value)], PACK)
    with np.errstate(all="ignore"):
        assert_same(found, [a / b for a, b in zip(floats(x), floats(d), strict=True)])
    assert not exact.any() if span is not ANY else exact.any()


def near_ties():
    """Dividends and divisors below 2^16 whose quotients are as near to the middle of two floats as
    those of fp32 numbers get."""
    random = np.random.default_rng(10)
    d = random.integers(1 << 22, 1 << 23, PACK * LANES) * 2 + 1
    middle = np.array([pow(int(one), -1, 1 << 25) for one in d])
    other = middle < 1 << 24
    middle = np.where(other, (1 << 25) - middle, middle)
    # The product is 1 more or less than a multiple of 2^25.
    x = (middle * d + np.where(other, 1, -1)) >> 25
    scaled = ((v * 2.0**-8).astype(np.float32) for v in (x, d))
    return (list(v.view(np.uint32).reshape(PACK, LANES)) for v in scaled)


def test_quotients_near_ties_are_correctly_rounded():
    x, d = near_ties()
    bound = alike(roots.MOST_DIVISOR.value)
    for text, right in ((roots.QUOTIENT, True), (roots.BY_CODE, False)):
        found, exact = ptx.run(text.value, [*x, *d, *bound], PACK)
        assert not exact.any()
        same = np.stack(found).view(np.float32) == np.stack(floats(x)) / np.stack(floats(d))
        assert same.all() == right


@pytest.mark.parametrize("span", [{"least": 26, "most": 145}, ANY], ids=str)
def test_quotients_by_roots_of_mx4_are_correctly_rounded(span):
    d = [bits & 0x7FE00000 for bits in numbers(8, least=54, most=145, signed=False)]
    x = numbers(9, **span)
    inputs = [*x, *d, *alike(roots.MOST_DIVISOR.value)]
    found, exact = ptx.run(roots.BY_CODE.value, inputs, PACK)
    with np.errstate(all="ignore"):
        assert_same(found, [a / b for a, b in zip(floats(x), floats(d), strict=True)])
    assert not exact.any() if span is not ANY else exact.any()


def test_zeros_take_the_fused_operations():
    """Rows of an embedding without gradients have moments of zero."""
    zeros = [np.zeros(LANES, np.uint32)] * PACK
    inputs = [*zeros, *zeros, *alike(1e-8), *alike(roots.MOST.value)]
    found, exact = ptx.run(roots.OVER_ROOT.value, inputs, PACK)
    assert not exact.any()
    assert not np.any(found)


def test_quotients_of_numbers_in_range_are_correctly_rounded():
    x, d = numbers(5, least=95, most=130), numbers(6, least=95, most=130, signed=False)
    (found,), _ = ptx.run(roots.IN_RANGE.value, [x[0], d[0]], 1)
    assert_same([found], [floats(x)[0] / floats(d)[0]])


def test_words_are_packed_and_unpacked():
    low, high, *_ = words = numbers(7)
    (pairs,), _ = ptx.run(packing.PAIR.value, [low, high], 1)
    np.testing.assert_array_equal(pairs, low >> 16 | high & 0xFFFF0000)

    found, _ = ptx.run(packing.UPPER_BYTES.value, [low], 4)
    np.testing.assert_array_equal(found, [(low >> 8 * j & 255) << 24 for j in range(4)])

    codes = [word & 0x7F for word in words]
    finite = np.where(low & 1, np.uint32(0xFFFFFFFF), np.uint32(0xFF00FF00))  # one byte per code
    for text, bits in ((packing.BYTES.value, []), (packing.SIGNED_BYTES.value, words)):
        (packed,), _ = ptx.run(text, [*codes, *bits, finite], 1)
        for j, code in enumerate(codes):
            signed = code | (bits[j] >> 31 << 7 if bits else np.uint32(0))
            expected = np.where(finite >> 8 * j & 255, signed, 4)
            np.testing.assert_array_equal(packed >> 8 * j & 255, expected)
