"""The table of algorithms that the tests cross with backends, dtypes and formats.

A new rule adds a row to CASES, and every test that uses the table then runs on the rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

import onepass
from onepass.engine.backends import BACKENDS, Entry, StepArgs
from onepass.engine.hyper_table import History
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.rules import HYPER_WIDTH, RULES, Rule

from .support.comparison import assert_same as assert_same
from .support.comparison import same_bits as same_bits
from .support.thorough import THOROUGH


@dataclass(frozen=True)
class Case:
    """An algorithm and its options.

    Attributes:
        name: name of the rule.
        ours: class in onepass.
        torch: class in torch.optim; None if there is none.
        lr: learning rate of the tests.
        base: options of every variant.
        options: combinations of options, one for each variant.
        direction: (oracle, gradient) -> the float64 update that lr multiplies; None if
            tests/oracle.py has the formula.
    """

    name: str
    ours: type[onepass.Optimizer]
    torch: type[torch.optim.Optimizer] | None
    lr: float
    base: dict[str, Any]
    options: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    direction: Callable[[Any, torch.Tensor], torch.Tensor] | None = None

    def variants(self) -> Iterator[dict[str, Any]]:
        """Every combination of options, with both kinds of weight decay and both `maximize`."""
        for option, decoupled, maximize in itertools.product(
            self.options, (False, True), (False, True)
        ):
            if option.get("cautious_weight_decay") and not decoupled:
                continue
            yield {
                "lr": self.lr,
                "weight_decay": 0.1,
                **self.base,
                **option,
                "decoupled_weight_decay": decoupled,
                "maximize": maximize,
            }


def _product(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def nadam(oracle: Any, g: torch.Tensor) -> torch.Tensor:
    """The update of NAdam, written as in torch.optim.NAdam."""
    o, t = oracle.o, oracle.t
    (beta1, beta2), decay = o.get("betas", (0.9, 0.999)), o.get("momentum_decay", 4e-3)
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * decay)) for k in (t, t + 1))
    oracle.s["mu_product"] = oracle.s.get("mu_product", torch.ones(())) * mu  # fp32 in torch.optim
    product = oracle.s["mu_product"].double()
    m, v = oracle.state("exp_avg"), oracle.state("exp_avg_sq")
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_((1 - beta2) * g * g)
    nesterov = g * (1 - mu) / (1 - product) + m * mu_next / (1 - product * mu_next)
    return nesterov / ((v / (1 - beta2**t)).sqrt() + o.get("eps", 1e-8))


def ademamix(oracle: Any, g: torch.Tensor) -> torch.Tensor:
    """The update of AdEMAMix as in github.com/apple/ml-ademamix, without the eps in its logs."""
    o, t = oracle.o, oracle.t
    beta1, beta2, beta3 = o.get("betas", (0.9, 0.999, 0.9999))
    alpha, t_alpha, t_beta3 = o.get("alpha", 5.0), o.get("t_alpha"), o.get("t_beta3")
    if t_alpha is not None and t < t_alpha:
        alpha = t / t_alpha * alpha
    if t_beta3 is not None and t < t_beta3:
        half_life = [math.log(0.5) / math.log(beta) - 1 for beta in (beta1, beta3)]
        mixed = (1 - t / t_beta3) * half_life[0] + t / t_beta3 * half_life[1]
        beta3 = 0.5 ** (1 / (mixed + 1))
    m, slow, v = (oracle.state(key) for key in ("exp_avg", "exp_avg_slow", "exp_avg_sq"))
    m.mul_(beta1).add_((1 - beta1) * g)
    slow.mul_(beta3).add_((1 - beta3) * g)
    v.mul_(beta2).add_((1 - beta2) * g * g)
    denom = v.sqrt() / math.sqrt(1 - beta2**t) + o.get("eps", 1e-8)
    return (m / (1 - beta1**t) + alpha * slow) / denom


def schedulefree(oracle: Any, g: torch.Tensor) -> torch.Tensor:
    """The update of y in algorithm 1 of Defazio et al. (2024), with x computed from y and z.

    The oracle multiplies the result by ``lr`` and adds the decoupled decay of y.
    """
    o, t = oracle.o, oracle.t
    (beta1, beta2), eps = o.get("betas", (0.9, 0.999)), o.get("eps", 1e-8)
    y, z = oracle.p, oracle.s.setdefault("z", oracle.p.clone())
    x = (y - (1 - beta1) * z) / beta1
    lr = o["lr"] * min(1.0, t / (o.get("warmup_steps") or 1))
    r, power, before = o.get("r", 0.0), o.get("weight_lr_power", 2.0), oracle.s.get("lr_max", 0.0)
    highest = oracle.s["lr_max"] = max(before, lr)
    weight = t**r * highest**power
    # weight_sum is divided by the weight of the last step.
    total = oracle.s.get("weight_sum", 0.0) * (t - 1) ** r * before**power + weight
    oracle.s["weight_sum"] = total / weight
    v = oracle.state("exp_avg_sq")
    v.mul_(beta2).add_((1 - beta2) * g * g)
    update = g / ((v / (1 - beta2**t)).sqrt() + eps)
    decay = o["weight_decay"] * y if o["decoupled_weight_decay"] else 0.0
    update = update + decay
    z = oracle.s["z"] = z - lr * update
    c = weight / total
    x = (1 - c) * x + c * z
    return (y - ((1 - beta1) * z + beta1 * x)) / o["lr"] - decay


BOTH = (False, True)
CAUTIOUS = {"cautious_weight_decay": (True,)}
CASES = [
    Case(
        "sgd",
        onepass.SGD,
        torch.optim.SGD,
        0.02,
        {},
        [
            {},
            {"momentum": 0.9, "dampening": 0.25},
            {"momentum": 0.9, "nesterov": True},
            *_product(momentum=(0, 0.9), **CAUTIOUS),
        ],
    ),
    Case(
        "adagrad",
        onepass.Adagrad,
        torch.optim.Adagrad,
        0.1,
        {"lr_decay": 0.01, "initial_accumulator_value": 0.1},
        _product(eps_in_sqrt=BOTH),
    ),
    Case(
        "rmsprop",
        onepass.RMSprop,
        torch.optim.RMSprop,
        0.01,
        {},
        _product(momentum=(0, 0.9), centered=BOTH, eps_in_sqrt=BOTH),
    ),
    Case("adam", onepass.Adam, torch.optim.Adam, 0.01, {}, _product(amsgrad=BOTH)),
    Case(
        "adamw",
        onepass.AdamW,
        torch.optim.AdamW,
        0.01,
        {},
        [*_product(amsgrad=BOTH), *_product(amsgrad=BOTH, **CAUTIOUS)],
    ),
    Case("lion", onepass.Lion, None, 0.01, {}, [{}, *_product(**CAUTIOUS)]),
    Case(
        "ademamix",
        onepass.AdEMAMix,
        None,
        0.01,
        {},
        [{}, {"alpha": 3.0, "t_alpha": 50, "t_beta3": 60}],
        direction=ademamix,
    ),
    Case(
        "nadam",
        onepass.NAdam,
        torch.optim.NAdam,
        0.01,
        {},
        [{}, *_product(**CAUTIOUS)],
        direction=nadam,
    ),
    Case(
        "schedulefree",
        onepass.AdamWScheduleFree,
        None,
        0.01,
        {},
        [{}, {"warmup_steps": 30, "r": 1.5, "weight_lr_power": 0.5}],
        direction=schedulefree,
    ),
]

VARIANTS = [
    (case, variant, f"{case.name}-{i}")
    for case in CASES
    for i, variant in enumerate(case.variants())
]
# Variants with different kernels. `maximize` changes only a factor in the hyperparameter table, so
# each combination of the other options has one of its two values.
KERNEL_VARIANTS = [
    (case, variant, f"{case.name}-{i}")
    for case in CASES
    for i, variant in enumerate(case.variants())
    if variant["maximize"] == (i // 2 % 2 == 1)
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["fp32", "bf16"]
"""State formats without blocks."""

EVERY_FORMAT = [
    (states, weights, dtype)
    for states in STATE_FORMATS
    for weights, form in WEIGHT_FORMATS.items()
    for dtype in form.codes
]
"""Every combination of a state format, a weight format and a weight dtype that it serves."""


@cache
def some_formats(number: int) -> tuple[int, ...]:
    """Indices of the combinations of EVERY_FORMAT with which the ``number``-th row of a test runs.

    Each weight format occurs once, with the state formats in turn. As many rows as there are state
    formats have every combination together. `make test-all` runs each row with all of them.
    """
    weights = len(EVERY_FORMAT) // len(STATE_FORMATS)
    return tuple(
        i
        for i in range(len(EVERY_FORMAT))
        if THOROUGH or (sum(divmod(i, weights)) + number) % len(STATE_FORMATS) == 0
    )


def served(variant: dict[str, Any], states: str) -> bool:
    """Whether a state format supports the options of a variant."""
    return not (variant.get("centered") and STATE_FORMATS[states].block > 1)


FORMAT_IDS = [
    f"{str(dtype).removeprefix('torch.')}-{weights}-{states}"
    for states, weights, dtype in EVERY_FORMAT
]


SIZES = [(0,), (), (1,), (3,), (31,), (33,), (7, 37), (1023,), (1025,)]


def last_variant(case: Case, states: str) -> dict[str, Any]:
    """The variant with the most options on that a state format supports."""
    return [variant for variant in case.variants() if served(variant, states)][-1]


def make_params(
    sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int, device: str = "cpu"
) -> list[torch.Tensor]:
    """Parameters of different magnitudes, with the same values on each device."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for i, size in enumerate(sizes):
        value = torch.randn(size, generator=generator) * 10.0 ** (i % 3 - 1)
        params.append(torch.nn.Parameter(value.to(device, dtype)))
    return params


def set_grads(params: list[torch.Tensor], dtype: torch.dtype, seed: int) -> None:
    """Sets gradients of 1e-6 to 10 times a standard normal value; one element in eight is zero."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        scale = 10.0 ** torch.randint(-6, 2, param.shape, generator=generator)
        kept = torch.rand(param.shape, generator=generator) > 0.125
        grad = torch.randn(param.shape, generator=generator) * scale * kept
        grad = grad.to(param.device, dtype)
        if dtype != param.dtype:
            param.grad_dtype = None
        param.grad = grad


def mx4_at_its_edges(backend: str, device: str = "cpu") -> torch.optim.Optimizer:
    """AdamW after three steps that reach the limits of mx4.

    Ratios are clamped to their limit. Blocks contain roots that are close together, far apart, or
    mostly zero.
    """
    generator = torch.Generator().manual_seed(11)
    params = [torch.zeros(64 * 32 + tail, dtype=torch.bfloat16, device=device) for tail in (0, 5)]
    params = [param.requires_grad_() for param in params]
    # The ratio is clamped: after one gradient it is 0.1 / sqrt(1e-4) = 10.
    options = {"states": "mx4", "weights": "stochastic", "betas": (0.9, 0.9999), "seed": 5}
    optimizer = onepass.AdamW(params, lr=0.1, **options, backend=backend)
    for step in range(3):
        for param in params:
            block = torch.arange(len(param)) // 32
            size = torch.tensor([1.0, 1e-12, 1e12, 1e-4])[block % 4]
            close = 1 + torch.rand(len(param), generator=generator)
            far = torch.exp2(-12 * torch.rand(len(param), generator=generator))
            sign = torch.randint(0, 2, (len(param),), generator=generator) * 2 - 1
            grad = size * sign * torch.where(block % 3 == 2, far, close)
            if step == 1:
                grad[block % 5 == 1] = 0
            param.grad = grad.to(device, param.dtype)
        optimizer.step()
    return optimizer


SHAPES = [(33,), (), (4, 5), (0,)]


def train(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], steps: int, start: int = 0
) -> None:
    """Takes steps start to start + steps; the gradients depend on the step number only."""
    for step in range(start, start + steps):
        set_grads(params, torch.float32, seed=step)
        optimizer.step()


def clone(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the weights as new parameters."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


STEP_FORMATS = [
    {},
    {"states": "bf16"},
    {"states": "mx8"},
    {"states": "mx4", "weights": "stochastic"},
    {"states": "mx8", "weights": "split8"},
    {"weights": "kahan"},
    {"weights": "master", "ema_decay": 0.9},
]
"""Formats of each kind, for tests of the code between the gradients and the rule."""

STEP_LIST = [(33,), (), (4, 5), (0,), (257,)]


def adamw(params: list[torch.Tensor], **options: Any) -> onepass.AdamW:
    """AdamW with a large learning rate, so that each step changes weights visibly."""
    return onepass.AdamW(params, lr=0.02, weight_decay=0.1, **options)


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of all tensors that a skipped step must not change."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    held = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return [t.detach().clone() for t in (*params, *held)]


def runs_here() -> list[str]:
    """Names of the backends that can step CPU tensors on this machine."""
    cpu = torch.device("cpu")
    return [name for name, b in onepass.backends.BACKENDS.items() if not b.unavailable(cpu)]


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e-39, 1.2e-38, 6e-8, 6e-5, 65504.0, 65520.0, 1e30]
SPECIAL += [3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 1.0, 1.0 + 2**-9, -1.5]
"""Zeros, denormals, numbers near the limits of all dtypes, infinities and NaN."""


def step_of_shard(name: str, first: int, states: str, device: str = "cpu") -> list[torch.Tensor]:
    """Steps a shard that starts at element `first` of its parameter.

    The step is one of AdamW with amsgrad, bf16 gradients, and bf16 weights with stochastic
    rounding.

    Returns:
        The parameter, its states and their scales.
    """
    backend, form = BACKENDS[name], STATE_FORMATS[states]
    count = 2500
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(count, generator=generator).to(device, torch.bfloat16)
    grad = torch.randn(count, generator=generator).to(device, torch.bfloat16)
    held = {
        s: torch.zeros(-(-count // form.packed), dtype=form.dtype, device=device) for s in range(3)
    }
    scales = {}
    if form.scale is not None:
        scales = {
            s: torch.zeros(-(-count // form.block), dtype=form.scale, device=device)
            for s in range(3)
        }
    entry = Entry(param, held, form, 3, RULES["adam"], 3, 1, 11, first=first, scales=scales)
    prepared = backend.prepare([entry])
    hyper = torch.zeros(2, HYPER_WIDTH)
    hyper[1, :8] = torch.tensor([1.0, 0.01, 0.001, 0.9, 0.1, 0.99, 0.01, 1e-8])
    counters = torch.tensor([[0, 0], [(1 << 63) - 5, 3]])
    assert backend.refresh(prepared, [param], [grad])
    backend.run(prepared, StepArgs(hyper.to(device), counters.to(device)))
    return [param, *held.values(), *scales.values()]


def history(rule: Rule, steps: float, fresh: bool) -> History:
    """The counters of a parameter after some steps; scalar states differ from their start."""
    values = (s.starts_at or steps % 1000 for s in rule.scalar_states)
    return History(steps, fresh, tuple(value * 0.7 ** min(steps, 40) for value in values))


def advance(backend: Any, table: Any, verdict: torch.Tensor | None) -> None:
    """Counts a step in a table and derives its hyperparameters, as a step does around its sweep."""
    staged = backend.stage(table, verdict)
    backend.advance(table, verdict, staged)
    backend.count(table, staged)
