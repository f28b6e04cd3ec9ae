"""The building blocks of the specification: 16-bit codes, random bits, hyperparameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import onepass
from onepass.formats.floats import (
    decode_bf16,
    decode_fp16,
    encode_bf16,
    encode_bf16_stochastic,
    encode_fp16,
)
from onepass.numerics.random_bits import (
    SHARED_WEIGHT_BITS,
    STATE_BITS,
    WEIGHT_BITS,
    bits_from,
    random_bits,
    splitmix64,
)
from onepass.rules import HYPER_WIDTH, OPTIONS_WIDTH, RULES, StepOf, power
from onepass.rules.limits import MAX_STATES

from .cases import CASES

U32 = np.uint32
ALL_CODES = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
# Every fp32 value whose last 13 bits are 0. With their neighbours (NEAR_TIES), these values cover
# all rounding decisions of bf16 and fp16.
MANY = (np.arange(1 << 19, dtype=np.uint32) << np.uint32(13)).view(np.float32)
with np.errstate(all="ignore"):
    NEAR_TIES = np.concatenate(
        [MANY, *(np.nextafter(MANY, np.float32(s)) for s in (np.inf, -np.inf))]
    )


def torch_codes(values, dtype):
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


def same_codes(a, b, dtype):
    nan = torch.from_numpy(a.view(np.int16)).view(dtype).isnan().numpy()
    nan &= torch.from_numpy(b.view(np.int16)).view(dtype).isnan().numpy()
    return ((a == b) | nan).all()


def test_bf16_matches_torch():
    decoded = decode_bf16(ALL_CODES)
    expected = torch.from_numpy(ALL_CODES.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decoded, expected)
    assert same_codes(encode_bf16(decoded), ALL_CODES, torch.bfloat16)
    with np.errstate(all="ignore"):
        assert same_codes(
            encode_bf16(NEAR_TIES), torch_codes(NEAR_TIES, torch.bfloat16), torch.bfloat16
        )


def test_fp16_matches_torch():
    decoded = decode_fp16(ALL_CODES)
    expected = torch.from_numpy(ALL_CODES.view(np.int16)).view(torch.float16).float().numpy()
    np.testing.assert_array_equal(decoded, expected)
    with np.errstate(all="ignore"):
        assert same_codes(encode_fp16(decoded), ALL_CODES, torch.float16)
        assert same_codes(
            encode_fp16(NEAR_TIES), torch_codes(NEAR_TIES, torch.float16), torch.float16
        )


def test_stochastic_bf16_keeps_what_bf16_holds_and_brackets_the_rest():
    decoded = decode_bf16(ALL_CODES)
    for random in (0, 1, 0x7FFF, 0xFFFF):
        bits = np.full(len(decoded), random, np.uint32)
        assert same_codes(encode_bf16_stochastic(decoded, bits), ALL_CODES, torch.bfloat16)
    values = np.random.default_rng(0).normal(size=10000).astype(np.float32) ** 9
    low = decode_bf16(encode_bf16_stochastic(values, np.zeros(10000, np.uint32)))
    high = decode_bf16(encode_bf16_stochastic(values, np.full(10000, 0xFFFF, np.uint32)))
    assert (np.abs(low) <= np.abs(values)).all()
    assert (np.abs(high) >= np.abs(values)).all()
    gap = np.abs(high - low)
    assert (gap <= np.maximum(np.abs(values) * 2.0**-7, 2.0**-133)).all()


@pytest.mark.parametrize("value", [1.0 + 2.0**-12, 3.1e-5, -0.7, 1e-40, 2.0**-133 / 3, 1.9999])
def test_stochastic_bf16_is_unbiased(value):
    """The mean of 65,536 draws differs from the value by at most 4 standard errors."""
    draws = 1 << 16
    random = random_bits(3, 5, 8, 0, draws) & np.uint32(0xFFFF)
    values = np.full(draws, value, np.float32)
    decoded = decode_bf16(encode_bf16_stochastic(values, random)).astype(np.float64)
    error = decoded.mean() - float(np.float32(value))
    assert decoded.std() > 0
    assert abs(error) <= 4 * decoded.std() / math.sqrt(draws)


def test_random_bits_known_answers():
    """random_bits returns the values of its definition, recomputed here with Python integers."""

    def by_hand(seed, step, param_id, index, word):
        mask = (1 << 32) - 1
        stream = splitmix64(splitmix64(splitmix64(seed) ^ step) ^ param_id)
        key = splitmix64(stream ^ (word << 32 | index >> 32))
        x = ((index & mask) * 0x9E3779B9 + (key & mask)) & mask
        x ^= x >> 16
        x = x * 0x7FEB352D & mask
        x ^= (x >> 15) ^ (key >> 32)
        return x * 0x846CA68B & mask

    # The first two outputs of SplitMix64 with seed 0, as published with the generator.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    for where in [(0, 1, 0, 0, 0), (7, 3, 2, 12345, 1), (1 << 62, 9, 5, (1 << 32) - 2, 0)]:
        found = random_bits(*where[:4], 4, where[4])
        expected = [by_hand(*where[:3], where[3] + i, where[4]) for i in range(4)]
        assert found.tolist() == expected
    assert random_bits(0, 1, 0, 0, 3).tolist() == KNOWN


KNOWN = [3865129165, 2557184498, 1883049162]


def test_uses_share_only_bits_that_are_low_in_one_of_them():
    """No two states share a bit. A weight shares none without states that draw; with them, every
    shared bit is one of the lower 8 of the state or of the weight."""

    def bits_of(position):
        """The bits of an element in the use at a position -> their places in the use."""
        found = {}
        for bit in range(96):
            words = {w: np.array([1 << bit % 32 if w == bit // 32 else 0], U32) for w in range(3)}
            (value,) = bits_from(words, position).tolist()
            if value:
                found[bit] = value.bit_length() - 1
        assert sorted(found.values()) == list(range(16))
        return found

    states = [bits_of(position) for position in STATE_BITS]
    assert len(states) == MAX_STATES
    assert len({bit for state in states for bit in state}) == 16 * len(states)
    weight = bits_of(WEIGHT_BITS)
    assert not any(state.keys() & weight for state in states)
    weight = bits_of(SHARED_WEIGHT_BITS)
    for state in states:
        assert all(min(state[bit], weight[bit]) < 8 for bit in state.keys() & weight)


@pytest.mark.parametrize("slot", [0, 1])
def test_roundings_that_share_bits_are_nearly_uncorrelated(slot):
    """A value is rounded up if its random bits are at least a threshold. The covariance of these
    events for a state and a weight is at most 1/1024, for any two thresholds."""
    # Every value of bits 4 to 23, or 12 to 31: the lowest 4 bits of the lower use are left out.
    words = {0: np.arange(1 << 20, dtype=U32) << U32(4 + 8 * slot)}
    state = bits_from(words, STATE_BITS[slot])
    weight = bits_from(words, SHARED_WEIGHT_BITS)
    largest = 0.0
    for of_state in (0x3FF0, 0x8000, 0x8080, 0xF123):
        for of_weight in (0x0080, 0x5C80, 0x8000, 0xFF80):
            up, weight_up = state >= of_state, weight >= of_weight
            found = (up & weight_up).mean() - up.mean() * weight_up.mean()
            largest = max(largest, abs(found))
    assert largest == 1 / 1024


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_weight_draws_from_the_word_of_the_states_if_they_draw(backend):
    cases = {"fp32": WEIGHT_BITS, "dynamic8": WEIGHT_BITS}
    cases |= dict.fromkeys(("bf16", "mx8"), SHARED_WEIGHT_BITS)
    rng = np.random.default_rng(0)
    start = decode_bf16(encode_bf16(rng.standard_normal(1000).astype(np.float32)))
    grad = decode_bf16(encode_bf16(rng.standard_normal(1000).astype(np.float32)))
    words = {word: random_bits(5, 1, 0, 0, 1000, word) for word in range(2)}
    for states, position in cases.items():
        # Without momentum there is no state that draws.
        for momentum, where in ((0.9, position), (0.0, WEIGHT_BITS)):
            param = torch.from_numpy(start).bfloat16()
            param.grad = torch.from_numpy(grad).bfloat16()
            options = {"states": states, "weights": "stochastic", "backend": backend, "seed": 5}
            onepass.SGD([param], lr=0.01, momentum=momentum, **options).step()
            expected = encode_bf16_stochastic(
                start - np.float32(0.01) * grad, bits_from(words, where)
            )
            found = param.view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(found, expected, err_msg=f"{states} {momentum}")


def test_random_bits_do_not_depend_on_the_start_of_a_call():
    whole = random_bits(1, 2, 3, (1 << 32) - 100, 200)
    parts = [random_bits(1, 2, 3, (1 << 32) - 100 + i, 50) for i in range(0, 200, 50)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_random_bits_look_independent():
    """Halves, neighbours, blocks, words, steps and parameters: every |z| score is below 5."""
    n = 1 << 19
    scores = {}
    base = random_bits(11, 4, 6, 0, n)
    positions = {"low": STATE_BITS[0], "middle": SHARED_WEIGHT_BITS, "high": STATE_BITS[1]}
    halves = {name: bits_from({0: base}, position) for name, position in positions.items()}

    def unit(half):
        return (half.astype(np.float64) - 32767.5) / (65536 / math.sqrt(12))

    for name, half in halves.items():
        for bits in (half >> np.uint32(8), half & np.uint32(0xFF)):
            counts = np.bincount(bits, minlength=256)
            scores[f"{name} uniform"] = (
                ((counts - n / 256) ** 2 / (n / 256)).sum() - 255
            ) / math.sqrt(510)
        values = unit(half)
        for lag in (1, 2, 3, 4, 8, 16, 31, 32, 64, 256, 1024, 4096, 65536):
            scores[f"{name} lag {lag}"] = (values[:-lag] * values[lag:]).mean() * math.sqrt(n - lag)
            top = (half >> np.uint32(10)).astype(np.int64)
            counts = np.bincount(top[:-lag] * 64 + top[lag:], minlength=4096)
            expected = (n - lag) / 4096
            scores[f"{name} pairs {lag}"] = (
                ((counts - expected) ** 2 / expected).sum() - 4095
            ) / math.sqrt(2 * 4095)
        others = {"step": (11, 5, 6), "parameter": (11, 4, 7), "seed": (12, 4, 6)}
        for what, where in others.items():
            other = unit(random_bits(*where, 0, n) & np.uint32(0xFFFF))
            scores[f"{name} {what}"] = (values * other).mean() * math.sqrt(n)
        word = unit(random_bits(11, 4, 6, 0, n, word=1) & np.uint32(0xFFFF))
        scores[f"{name} word"] = (values * word).mean() * math.sqrt(n)
    scores["halves"] = (unit(halves["low"]) * unit(halves["high"])).mean() * math.sqrt(n)
    worst = max(scores, key=lambda name: abs(scores[name]))
    assert abs(scores[worst]) < 5, f"{worst}: {scores[worst]:.1f}"


def test_power_matches_pow_within_a_few_ulp():
    for base in (0.0, 0.5, 0.9, 0.95, 0.999, 0.9999):
        for exponent in (0, 1, 2, 3, 10, 1000, 16777216):
            assert power(base, exponent) == pytest.approx(base**exponent, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_have_the_declared_widths(case):
    rule, group = case.ours.rule, case.ours([torch.nn.Parameter(torch.ones(1))]).defaults
    options = rule.options_row(group)
    assert len(options) == OPTIONS_WIDTH
    advanced = rule.advance(options, 3, tuple(s.starts_at for s in rule.scalar_states))
    assert len(rule.derive(options, StepOf(3, False, advanced))) == rule.scalars
    assert len(rule.hyper(options, StepOf(3, False, advanced), 1.0)) == HYPER_WIDTH


def test_adam_hyperparameters_fold_the_bias_corrections():
    group = {"lr": 0.1, "weight_decay": 0.0, "decoupled_weight_decay": True}
    group |= {"betas": (0.9, 0.99), "eps": 1e-3, "maximize": False, "ema_decay": None}
    adam = RULES["adam"]
    step_size, _, _, _, _, _, eps = adam.derive(adam.options_row(group), StepOf(7, False))
    m, v = 0.3, 0.02
    expected = 0.1 * (m / (1 - 0.9**7)) / (math.sqrt(v / (1 - 0.99**7)) + 1e-3)
    assert step_size * m / (math.sqrt(v) + eps) == pytest.approx(expected, rel=1e-14)
