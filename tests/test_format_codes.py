"""The codes of the state formats, compared with their definition in float64 at every edge."""

from __future__ import annotations

import numpy as np
import pytest

from onepass.formats.mx4 import RATIO_LIMIT

from .moments import ADAM, ALL_RANDOM, F32, Moments, decode, encode, random_bits, there_and_back

LARGEST = np.finfo(np.float32).max
SMALLEST = np.float32(2.0**-149)

# How formats encode one moment: (format, kind, exponent bits, mantissa bits). mx4 encodes the root
# of a second moment, with finer codes if the block allows it. Ratios are tested separately.
CODES = {
    "mx8 first": ("mx8", "first", 4, 3),
    "mx8 second": ("mx8", "second", 5, 3),
    "mx4 first": ("mx4", "first", 2, 1),
    "mx4 second": ("mx4", "second", 3, 1),
}
# The least exponent of a block's lowest level. It is that of the smallest normal number, except
# that the second moment of mx8 includes denormals, and squares of mx4's roots must be exact.
LEAST = {"mx8 first": -126, "mx8 second": -127, "mx4 first": -126, "mx4 second": -73}
FINE, LEAST_FINE = (2, 2), -61  # fine codes of mx4's root; no scale byte marks them below
BLOCK_FORMATS = ("mx8", "mx4", "dynamic8")
STOCHASTIC = ("bf16", "mx8", "mx4")


def signed(case: str) -> bool:
    return CODES[case][1] == "first"


def floats(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """The levels of a minifloat without denormals; the lowest level is 1."""
    fractions = 1 + np.arange(1 << mantissa_bits) / (1 << mantissa_bits)
    return (2.0 ** np.arange(1 << exponent_bits)[:, None] * fractions).ravel()


def lowest_exponent(unit: np.ndarray, largest: float, least: int) -> int:
    """The smallest exponent of the scale at which the largest value does not clip."""
    exponent = least
    while unit[-1] * 2.0**exponent < largest:
        exponent += 1
    return exponent


def levels(case: str, block: np.ndarray) -> np.ndarray:
    """The magnitudes that a block with such values can represent, ascending, in float64."""
    _, _, exponent_bits, mantissa_bits = CODES[case]
    if case == "mx4 second" and len(block) == 32:
        unit = floats(*FINE)
        exponent = lowest_exponent(unit, block.max(), LEAST[case])
        if exponent >= LEAST_FINE and block.min() >= 2.0**exponent:
            return unit * 2.0**exponent
    unit = floats(exponent_bits, mantissa_bits)
    if signed(case):
        unit = unit - 1  # lifted by the lowest power of two, so that zero is a level
    exponent = lowest_exponent(unit, block.max(), LEAST[case])
    values = unit * 2.0**exponent
    if case == "mx8 second":
        values[0] = 0  # this code means zero
        if exponent == LEAST[case]:  # denormals of fp32
            values[:8] = np.arange(8) * 2.0**-129
    return values


def bracket(case: str, value: float, held: np.ndarray) -> tuple[float, float]:
    """The levels below and above a value; the lowest allowed level for both if it is below that."""
    if value == 0 and held[0] == 0:
        return 0.0, 0.0
    if not signed(case) and held[0] == 0:
        held = held[1:]  # no nonzero second moment decodes to zero
    if value <= held[0]:
        return held[0], held[0]
    above = int(np.searchsorted(held, value))
    return (held[above], held[above]) if held[above] == value else (held[above - 1], held[above])


def roots(case: str, values: np.ndarray) -> np.ndarray:
    """The values that the format encodes: roots of second moments in mx4."""
    return np.sqrt(values) if case == "mx4 second" else values


def blocks_to_try() -> dict[str, np.ndarray]:
    """Nonnegative values in blocks of 32 and in shorter blocks."""
    rng = np.random.default_rng(5)
    found = {
        "normal": np.abs(rng.standard_normal(32)),
        "31 small beside one": np.r_[1.0, np.full(31, 1e-3)],
        "31 tiny beside one": np.r_[np.full(20, 1e-12), 1.0, np.full(11, 3e-20)],
        "all magnitudes": 10.0 ** rng.uniform(-37, 37, 32),
        "zeros but one": np.r_[np.zeros(31), 7.7],
        "zeros": np.zeros(32),
        "denormals": rng.integers(0, 1 << 23, 32) * 2.0**-149,
        "denormals below a normal": np.r_[rng.integers(0, 1 << 23, 31) * 2.0**-149, 1e-36],
        "smallest": np.full(32, SMALLEST),
        "short": np.abs(rng.standard_normal(5)),
        "one": np.array([3.3e-5]),
        "33": np.abs(rng.standard_normal(33)) * np.r_[np.ones(32), 1e-9],
    }
    for exponent in range(-125, 126, 10):  # the whole range, with rounding at its top
        x = 2.0**exponent * (1 + rng.random(32)) * 2.0 ** -rng.integers(0, 12, 32)
        found[f"2^{exponent}"] = np.r_[x[:31], 1.999 * 2.0**exponent]
        found[f"2^{exponent}, close"] = np.r_[np.full(31, 0.3 * x[:31].max()), 2.0**exponent]
        found[f"2^{exponent}, within 100"] = 2.0**exponent * 100.0 ** -rng.random(32)
    return {name: values.astype(F32) for name, values in found.items()}


@pytest.mark.parametrize("case", CODES)
def test_values_round_to_neighbouring_levels_without_bias(case):
    name, kind, *_ = CODES[case]
    for label, block in blocks_to_try().items():
        for start in range(0, len(block), 32):
            part = block[start : start + 32]
            held = levels(case, roots(case, part))
            if case == "mx4 second" and not part.any():
                held[:] = 0
            # One block for each value of the random bits. Every 64th value is enough for most
            # blocks.
            draws = ALL_RANDOM if label == "31 small beside one" else ALL_RANDOM[::64]
            rows = len(draws)
            whole = np.zeros((rows, 32), F32)
            whole[:, : len(part)] = -part if signed(case) else part
            random = np.repeat(draws, 32)
            stored = encode(name, [whole.ravel()], [kind], [random])
            found = decode(name, stored, [kind], whole.size)[0].reshape(rows, 32)
            found = roots(case, -found if signed(case) else found)[:, : len(part)].astype(
                np.float64
            )
            for i, value in enumerate(roots(case, part).astype(np.float64)):
                below, above = bracket(case, value, held)
                where = f"{label}, element {i}: {value} between {below} and {above}"
                seen = np.unique(found[:, i])
                assert set(seen) <= {below, above}, where
                if below < above:
                    # The draws are evenly spaced, so the share is exact up to one draw.
                    share = (found[:, i] == above).mean()
                    assert abs(share - (value - below) / (above - below)) <= 1.01 / rows, where


def stored_everything(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Every code at every scale as (codes, scales); each block ends with the highest code."""
    _, _, exponent_bits, mantissa_bits = CODES[case]
    width = exponent_bits + mantissa_bits
    count = 1 << (width + signed(case))
    blocks = np.empty((-(-count // 31), 32), np.uint8)
    blocks[:, :31] = np.resize(np.arange(count), (len(blocks), 31))
    blocks[:, 31] = (1 << width) - 1
    lowest = LEAST[case] + 127
    highest = 127 + 62 if case == "mx4 second" else 254  # so that no value or square overflows
    scales = np.arange(lowest, highest - (1 << exponent_bits) + 2, dtype=np.uint8)
    if case == "mx4 second":  # scale bytes count from 1, and from 132 for the finer codes
        fine = np.arange(132, 132 + highest - 3 - (LEAST_FINE + 127) + 1, dtype=np.uint8)
        scales = np.r_[scales - np.uint8(lowest - 1), fine]
    return np.tile(blocks.ravel(), len(scales)), np.repeat(scales, len(blocks))


@pytest.mark.parametrize("case", CODES)
@pytest.mark.parametrize("random", [0, 1, 0x8000, 0xFFFF])
def test_every_code_at_every_scale_round_trips(case, random):
    name, kind, *_ = CODES[case]
    codes, scales = stored_everything(case)
    data = codes if name == "mx8" else codes[0::2] | codes[1::2] << 4
    values = decode(name, [(data, scales)], [kind], len(codes))[0]
    assert np.isfinite(values).all()
    if kind == "second":
        assert (values >= 0).all()
        assert ((values == 0) == (codes == 0)).all() if name == "mx8" else (values > 0).all()
    again = encode(name, [values], [kind], random)[0]
    np.testing.assert_array_equal(again[0], data)
    np.testing.assert_array_equal(again[1], scales)
    # Different codes decode to different values, except 0 and -0.
    one_scale = len(codes) // len(np.unique(scales))
    found, there = values[:one_scale], np.unique(codes[:one_scale])
    assert len(np.unique(found)) == len(there) - signed(case)


@pytest.mark.parametrize("random", [0, 0xFFFF])
def test_every_ratio_of_mx4_round_trips(random):
    """Every code of m / sqrt(v) with every code of sqrt(v); blocks end with the highest codes."""
    ratio, root = (np.resize(x, (9, 31)) for x in np.divmod(np.arange(256), 16))
    ratio, root = (np.c_[x, np.full(9, top)].ravel() for x, top in ((ratio, 7), (root, 15)))
    first, second = ((x[0::2] | x[1::2] << 4).astype(np.uint8) for x in (ratio, root))
    for scale in range(255):
        for of_roots in (70, 190):  # coarse and fine codes
            stored = [(first, np.full(9, scale, np.uint8))]
            stored += [(second, np.full(9, of_roots, np.uint8))]
            values = decode("mx4", stored, ADAM, len(ratio))
            again = encode("mx4", values, ADAM, random)
            for (data, scales), (other, others) in zip(stored, again, strict=True):
                np.testing.assert_array_equal(data, other)
                np.testing.assert_array_equal(scales, others)


def test_ratios_of_mx4_round_to_neighbouring_steps_without_bias():
    """A step is the least float with 3 mantissa bits >= 1/7 of the largest ratio."""
    rng = np.random.default_rng(12)
    cases = [rng.standard_normal(32), rng.random(5) * 1e-3, np.r_[3.0, np.zeros(31)], [7.0, -1e-3]]
    cases += [10.0 ** rng.uniform(-8, 0.8, 32), [7e-12, 1e-12], [0.0], [-6.999, 0.9]]
    draws = ALL_RANDOM[::64]
    for ratios in cases:
        exp_avg = np.zeros((len(draws), 32), F32)
        exp_avg[:, : len(ratios)] = F32(2) * np.asarray(ratios, F32)
        second = np.full(exp_avg.size, 4, F32)
        random = [np.repeat(draws, 32)] * 2
        stored = encode("mx4", (exp_avg.ravel(), second), ADAM, random)
        found = decode("mx4", stored, ADAM, second.size)[0].reshape(exp_avg.shape) / 2
        truth = exp_avg[0].astype(np.float64) / 2
        floats = 2.0 ** np.arange(-32, 1)[:, None] * (1 + np.arange(8) / 8)
        step = floats[(floats >= np.abs(truth).max() / 7) & (floats >= 1.25 * 2.0**-32)].min()
        below = np.floor(np.abs(truth) / step)
        seen = np.abs(found.astype(np.float64)) / step
        assert ((seen == below) | (seen == below + 1)).all()
        assert (np.sign(found) * np.sign(truth) >= 0).all()
        share = (seen == below + 1).mean(0)
        assert np.abs(share - (np.abs(truth) / step - below)).max() <= 1.01 / len(draws)


def test_mx4_limits_the_ratio_and_nothing_else():
    exp_avg_sq = np.full(64, 4, F32)
    exp_avg = F32(2) * np.r_[np.full(32, 0.1), np.full(32, 7)].astype(F32)
    exp_avg[[3, 40]] = 100, -1e30
    for random in (0, 0xFFFF):
        found = there_and_back("mx4", (exp_avg, exp_avg_sq), ADAM, random)[0]
        np.testing.assert_array_equal(np.abs(found[32:]), 2 * RATIO_LIMIT)
        assert found[3] == 2 * RATIO_LIMIT
        assert found[40] == -2 * RATIO_LIMIT
        # SGD and Lion encode no ratio, so nothing is clamped.
        alone = there_and_back("mx4", [exp_avg], ["first"], random)[0]
        assert abs(alone[40]) >= 1e30 / 2


def test_bytes_of_zero_are_zero():
    for name in BLOCK_FORMATS:
        scales = np.zeros(2, F32 if name == "dynamic8" else np.uint8)
        data = np.zeros(40 if name != "mx4" else 20, np.uint8)
        # In the signed map of dynamic8 zero has code 127. Code 0 decodes to 0 because its scale is
        # 0.
        for values in decode(name, [(data, scales)] * 2, ADAM, 40):
            assert (values == 0).all()


@pytest.mark.parametrize("name", [*STOCHASTIC, "dynamic8"])
def test_zero_stays_zero(name):
    mixed = np.zeros(64, F32)
    mixed[3] = 1.5
    for random in (0, 0x8000, 0xFFFF):
        exp_avg, exp_avg_sq = there_and_back(name, (mixed, mixed), ADAM, random)
        assert (exp_avg[mixed == 0] == 0).all()
        assert (exp_avg_sq[32:] == 0).all()
        if name != "mx4":  # mx4 encodes a zero as nonzero unless its block is all zero
            assert (exp_avg_sq[mixed == 0] == 0).all()


@pytest.mark.parametrize("name", ["mx8", "mx4"])
def test_no_second_moment_is_lost(name):
    """Tests denormals beside the largest values, and blocks of denormals only."""
    rng = np.random.default_rng(6)
    bits = rng.integers(1, 0x7F000000, 1 << 16).astype(np.uint32)
    wide = bits.view(F32)
    close = (bits & np.uint32(0x00FFFFFF) | np.uint32(1)).view(F32)
    near = np.sort(bits).view(F32)  # neighbours of similar size
    for values in (wide, close, near, np.full(32, SMALLEST), np.full(1, SMALLEST)):
        assert (values > 0).all()
        for random in (0, 0xFFFF):
            found = there_and_back(name, [values], ["second"], random)[0]
            assert (found > 0).all()


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("kind", ["first", "second"])
@pytest.mark.parametrize("value", [LARGEST, np.float32(1.9e38)])
def test_the_largest_finite_value_is_neither_lost_nor_small(name, kind, value):
    values = np.array([value, 1.0], F32)
    for random in (0, 0xFFFF):
        with np.errstate(over="ignore"):  # mx4 squares a root that was rounded up
            found = there_and_back(name, [values], [kind], random)[0]
        assert found[0] >= 0.4 * value
        # Rounding up may overflow to infinity, and in mx4 so may lifting by 1/8, but must not
        # return a small value.
        assert np.isfinite(found[0]) or value == LARGEST or random
        assert np.isfinite(found[1])


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("random", [0, 0xFFFF])
def test_a_block_with_a_value_that_is_not_finite_becomes_nan(name, bad, random):
    block = 256 if name == "dynamic8" else 32
    values = np.abs(np.random.default_rng(7).standard_normal(3 * block + 5)).astype(F32)
    for at in (block + 3, 3 * block + 1):  # the second block, and the last one, which is incomplete
        hurt = values.copy()
        hurt[at] = bad
        inside = np.arange(len(values)) // block == at // block
        for kind in ("first", "second"):
            if kind == "second" and bad == -np.inf:
                continue  # a mean of squares is not negative
            found = there_and_back(name, [hurt], [kind], random)[0]
            assert np.isnan(found[inside]).all()
            assert np.isfinite(found[~inside]).all()
        # As moments of Adam: a NaN in the second moment makes the first NaN in mx4, but not vice
        # versa.
        with np.errstate(invalid="ignore"):
            exp_avg, exp_avg_sq = there_and_back(name, (hurt, values), ADAM, random)
            assert np.isnan(exp_avg[inside]).all()
            assert np.isfinite(exp_avg_sq).all()
            if bad != -np.inf:
                exp_avg, exp_avg_sq = there_and_back(name, (values, hurt), ADAM, random)
                assert np.isnan(exp_avg_sq[inside]).all()
                assert np.isnan(exp_avg[inside]).all() == (name == "mx4")
                assert np.isfinite(exp_avg[~inside]).all()


def test_bf16_keeps_infinity_and_nan_where_they_are():
    values = np.array([1, np.inf, -np.inf, np.nan, 2], F32)
    for random in (0, 0xFFFF):
        np.testing.assert_array_equal(
            there_and_back("bf16", [values], ["first"], random)[0], values
        )


@pytest.mark.parametrize("name", ["mx8", "mx4"])
@pytest.mark.parametrize("power", [33, -33])
def test_scaled_gradients_have_the_same_codes(name, power):
    rng = np.random.default_rng(8)
    count = 32 * 32 + 7
    plain = Moments(name, count, (0.9, 0.99))
    scaled = Moments(name, count, (0.9, 0.99))
    spread = 10.0 ** rng.uniform(-4, 0, count)
    for _ in range(60):
        grad = (rng.standard_normal(count) * spread).astype(F32)
        u, v = plain.add(grad), scaled.add(grad * F32(2.0**power))
        np.testing.assert_array_equal(u, v)
    shifts = (power, 2 * power) if name == "mx8" else (0, power)  # mx4 stores a ratio and a root
    for a, b, shift in zip(plain.stored, scaled.stored, shifts, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1].astype(int) + shift, b[1].astype(int))


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("kind", ["first", "second"])
def test_draws_of_the_generator_are_unbiased(name, kind):
    """The mean of 4,096 draws is within four standard errors.

    The mean is over roots if mx4 encodes roots.
    """
    draws = 4096
    top = 2.0**-3  # the power of two below the block maximum
    small = {"mx8 first": top * 2**-18, "mx8 second": top * 2**-31 * 1.125}
    small |= {"mx4 first": top / 16, "mx4 second": (top * 2**-7) ** 2}
    least = small.get(f"{name} {kind}", 2.0**-133)
    points = {"just above the smallest": 1.02 * least, "between": 0.0371, "top": 1.61 * top}
    if kind == "first":  # a second moment is clamped to its smallest code there
        points |= {"just above zero": 0.01 * least, "halfway to the smallest": 0.5 * least}
    for label, value in points.items():
        values = np.zeros((draws, 32), F32)
        values[:, 0] = top * 1.75 if kind == "first" or name != "mx4" else (top * 1.5) ** 2
        values[:, 7] = value
        random = random_bits(1, values.size)
        found = there_and_back(name, [values.ravel()], [kind], [random[kind == "second"]])[0]
        x = found.reshape(draws, 32)[:, 7].astype(np.float64)
        truth = float(F32(value))
        if (name, kind) == ("mx4", "second"):
            x, truth = np.sqrt(x), float(np.sqrt(F32(value)))
        below, above = x.min(), x.max()
        assert below <= truth <= above, label
        share = (truth - below) / (above - below)
        error = (above - below) * np.sqrt(share * (1 - share) / draws)
        assert abs(x.mean() - truth) <= 4 * error, label
