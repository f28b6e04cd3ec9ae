"""Copies of one optimizer that take the same steps, and the checks after each step.

``plain`` runs on the reference backend with a new plan for every step and contiguous gradients.
``reference`` and ``cpu`` are compared with it bit for bit. Weights and states in fp32 are also
compared with the same step in float64.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS
from onepass.rules.group_options import DEFAULTS, option

from ..cases import CASES, DTYPES, make_params, same_bits, served
from ..oracle import Oracle
from .odd_tensors import AMBIENT, plain_value
from .targets import instruction_sets

Tensor = torch.Tensor
Grads = list[Tensor | None]
Contents = dict[str, Any]

SHAPES = [(0,), (), (1,), (3,), (31,), (33,), (1023,), (1025,), (7, 37), (5, 3), (2, 3, 2, 2)]
SETTINGS: dict[str, list[Any]] = {
    "max_grad_norm": [None, 0.01, 1.0],
    "skip_nonfinite": [False, True],
    "zero_grads": [False, True],
}
REFUSALS = (ValueError, TypeError, RuntimeError)
"""Exceptions that a step raises if it cannot be taken."""

TORCH_ONLY = ("foreach", "fused", "capturable", "differentiable")
"""Options without effect that torch.optim.Optimizer adds to groups when it is copied."""

EPS = torch.finfo(torch.float32).eps
TINY = 4 * 2.0**-149


def clones(grads: Grads) -> Grads:
    return [None if grad is None else grad.clone() for grad in grads]


def nonfinite(grads: Grads) -> bool:
    return any(grad is not None and not grad.isfinite().all() for grad in grads)


class Copy:
    """One of the optimizers that must stay equal.

    Attributes:
        skipped: number of steps that the optimizer must have counted as skipped.
        served: weights that only patches change (onepass.take_delta), by index of the parameter.
    """

    def __init__(self, name: str, optimizer: onepass.Optimizer) -> None:
        self.name, self.optimizer, self.skipped = name, optimizer, 0
        self.served: dict[str, Tensor] = {}
        self.serve_new()

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The group of each parameter."""
        return [group for group in self.optimizer.param_groups for _ in group["params"]]

    def replace(self, optimizer: onepass.Optimizer) -> None:
        """Replaces the optimizer; its count of skipped steps may be 0."""
        assert int(optimizer.skipped_steps) in (0, self.skipped)
        self.optimizer, self.skipped = optimizer, int(optimizer.skipped_steps)

    def contents(self) -> Contents:
        """Copies of everything that a step may change or must keep, by (name, index)."""
        found: Contents = {}
        for i, p in enumerate(self.params):
            found["parameter", i] = p.detach().clone()
            for key, value in self.optimizer.state.get(p, {}).items():
                found[key, i] = value.clone() if isinstance(value, Tensor) else value
        for i, group in enumerate(self.optimizer.param_groups):
            # A missing key means the default.
            for key, value in {**DEFAULTS, **group}.items():
                if key in TORCH_ONLY:
                    continue
                value = float(value) if isinstance(value, Tensor) else value
                found["group", i, key] = len(value) if key == "params" else value
        return found

    def gradients(self) -> Grads:
        return [None if p.grad is None else plain_value(p.grad) for p in self.params]

    def serve_new(self) -> None:
        """Adds the weights of new parameters to those that only patches change."""
        for i, p in enumerate(self.params):
            if str(i) not in self.served:
                self.served[str(i)] = p.detach().clone()

    def send_patch(self) -> None:
        """Checks that the changed weights, which the steps have recorded, are all that changed."""
        if self.optimizer.changes is None:
            return
        delta = onepass.take_delta(torch.nn.ParameterList(self.params), self.optimizer)
        onepass.apply_delta(self.served, delta)
        for i, p in enumerate(self.params):
            assert same_bits(self.served[str(i)], p.detach()), f"{self.name}: patched weight {i}"

    def set_gradients(self, grads: Grads) -> None:
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = None
            if grad is not None and grad.dtype != p.dtype:
                p.grad_dtype = None  # type: ignore[attr-defined]
            p.grad = grad


def assert_equal(found: Contents, expected: Contents, which: str) -> None:
    """Compares tensors bit for bit and everything else by ==."""
    more, less = found.keys() - expected.keys(), expected.keys() - found.keys()
    assert not more, f"{which}: has {sorted(more)}"
    assert not less, f"{which}: lacks {sorted(less)}"
    for key, value in expected.items():
        other = found[key]
        tensors = isinstance(value, Tensor) and isinstance(other, Tensor)
        same = same_bits(value, other) if tensors else value == other
        assert same, f"{which}: {key} is {shown(other)}, not {shown(value)}"


def shown(value: Any) -> str:
    """A value as text; of a tensor, the first four elements."""
    if not isinstance(value, Tensor):
        return repr(value)
    first = ", ".join(f"{x:.6g}" for x in value.reshape(-1)[:4].tolist())
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} [{first}, ...]"


def assert_same_gradients(found: Grads, expected: Grads, which: str) -> None:
    for i, (grad, other) in enumerate(zip(found, expected, strict=True)):
        if grad is not None and other is not None:
            assert torch.equal(grad.nan_to_num(), other.nan_to_num()), f"{which}: gradient {i}"


def draw_group(case: Any, rng: random.Random) -> dict[str, Any]:
    """Random options of a group, with the dtype, shapes and seed of its parameters."""
    states, dtype = rng.choice(list(STATE_FORMATS)), rng.choice(DTYPES)
    if rng.random() < 0.4:
        states, dtype = "fp32", torch.float32
    weights = rng.choice([name for name, form in WEIGHT_FORMATS.items() if dtype in form.codes])
    options = rng.choice([v for v in case.variants() if served(v, states)])
    options = {**options, "states": states, "weights": weights, "seed": rng.choice((0, 7))}
    options["ema_decay"] = rng.choice((None, None, 0.9))
    many = rng.random() < 0.1
    count = 40 if many else rng.randint(1, 4)
    shapes = [rng.choice(SHAPES[:6] if many else SHAPES) for _ in range(count)]
    return {"dtype": dtype, "shapes": shapes, "start": rng.randrange(1 << 30), **options}


def make_group(drawn: dict[str, Any]) -> dict[str, Any]:
    """A group with new parameters; equal arguments give equal parameters."""
    options = {k: v for k, v in drawn.items() if k not in ("dtype", "shapes", "start")}
    params = make_params(drawn["shapes"], drawn["dtype"], drawn["start"])
    for i, p in enumerate(params):
        if i % 2 and p.dim() > 1:  # dense, with permuted strides
            p.data = p.detach().transpose(0, 1).contiguous().transpose(0, 1)
    return {"params": params, **options}


class World:
    """All copies of the optimizer, and the state that the checks need.

    Attributes:
        plain, others: the copies.
        log: text of the operations so far.
        number: number of the current operation.
        begun: indices of the parameters that have taken a step with momentum. The first such step
            sets SGD's buffer to the gradient.
    """

    def __init__(self, seed: int, say: bool = False) -> None:
        rng = random.Random(f"{seed}")
        self.case, self.say, self.log = rng.choice(CASES), say, []
        self.begun: set[int] = set()
        self.number: int | None = None
        drawn = [draw_group(self.case, rng) for _ in range(rng.choice((1, 2, 2, 3)))]
        settings = {name: rng.choice(values) for name, values in SETTINGS.items()}
        backends, isa = {"plain": "reference", "reference": "reference"}, ""
        if not onepass.ops.missing:
            backends["cpu"], isa = "cpu", onepass.ops.cpu_isa(rng.choice(instruction_sets()))
        tracked = rng.random() < 0.5
        self.tell(f"onepass.{self.case.ours.__name__} with {settings}, {isa}, {tracked=}")
        for i, group in enumerate(drawn):
            self.tell(f"  group {i}: {group}")
        self.plain, *self.others = (
            Copy(
                name,
                self.case.ours(
                    [make_group(group) for group in drawn],
                    backend=backend,
                    norm_type=math.inf,
                    track_changes=tracked and name != "plain",
                    **settings,
                ),
            )
            for name, backend in backends.items()
        )

    @property
    def copies(self) -> list[Copy]:
        return [self.plain, *self.others]

    def tell(self, text: str) -> None:
        """Logs the next operation, and prints it if `say` is set, so that a crash shows it."""
        text = text if self.number is None else f"{self.number}: {text}"
        self.log.append(text)
        if self.say:
            print(text, file=sys.__stderr__, flush=True)

    def draw_gradients(self, rng: random.Random) -> Grads:
        """Random gradients of 1e-6 to 10 times a standard normal value.

        Some elements are zero, and some gradients are missing or have another dtype than the
        parameter.
        """
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        missing, mixed = rng.choice((0, 0, 0.3)), rng.choice((0, 0, 0.5))
        grads: Grads = []
        for p in self.plain.params:
            scale = 10.0 ** torch.randint(-6, 2, p.shape, generator=generator)
            kept = torch.rand(p.shape, generator=generator) > 0.125
            grad = torch.randn(p.shape, generator=generator) * scale * kept
            dtype = rng.choice(DTYPES) if rng.random() < mixed else p.dtype
            grads.append(None if rng.random() < missing else grad.to(dtype))
        return grads

    def step(
        self,
        grads: Grads,
        build: Callable[[Grads], Grads] = clones,
        ambient: str = "",
        may_refuse: bool = False,
    ) -> None:
        """Takes a step with every copy and runs all checks.

        Args:
            grads: values of the gradients.
            build: makes the gradients of all copies but the plain one from the values.
            ambient: name of the setting in which all copies but the plain one step.
            may_refuse: whether the step may raise without changes; a step with ordinary gradients
                follows then.
        """
        before = self.plain.contents()
        expected = self.in_float64(grads)
        assert hasattr(self.plain.optimizer, "_plan")
        self.plain.optimizer._plan = None
        self.plain.set_gradients(clones(grads))
        self.plain.optimizer.step()
        self.check_step(grads, before, expected)
        for one in self.others:
            one.set_gradients(build(clones(grads)))
            unchanged = one.contents()
            try:
                with AMBIENT[ambient]() if ambient else nullcontext():
                    one.optimizer.step()
            except REFUSALS:
                if not may_refuse:
                    raise
                self.check_unchanged(one, unchanged, grads)
                one.set_gradients(clones(grads))
                one.optimizer.step()
        self.compare(grads)

    def compare(self, grads: Grads) -> None:
        """Compares every copy with the plain one after a step with these gradients."""
        skipped = self.plain.optimizer.skip_nonfinite and nonfinite(grads)
        measured = self.plain.optimizer.max_grad_norm is not None
        measured = measured or self.plain.optimizer.skip_nonfinite
        expected = self.plain.contents()
        norm = max((float(g.abs().max()) for g in grads if g is not None and g.numel()), default=0)
        zeros = [None if grad is None else torch.zeros_like(grad) for grad in grads]
        for one in self.copies:
            optimizer = one.optimizer
            one.skipped += skipped
            assert_equal(one.contents(), expected, f"{one.name} after a step")
            left = zeros if optimizer.zero_grads else grads
            assert_same_gradients(one.gradients(), left, f"{one.name} after a step")
            if any(grad is not None for grad in grads):
                assert int(optimizer.skipped_steps) == one.skipped, f"{one.name}: skipped_steps"
                if measured:
                    assert float(optimizer.grad_norm) == norm, f"{one.name}: grad_norm"

    def check_unchanged(self, one: Copy, before: Contents, grads: Grads) -> None:
        """Checks that a copy whose step raised is unchanged."""
        assert_equal(one.contents(), before, f"{one.name} after a step that raised")
        assert_same_gradients(one.gradients(), grads, f"{one.name} after a step that raised")

    def check_step(self, grads: Grads, before: Contents, expected: dict[Any, Any]) -> None:
        """Checks the counters, the parameters without gradients, and the errors against float64."""
        after = self.plain.contents()
        skipped = self.plain.optimizer.skip_nonfinite and nonfinite(grads)
        for i, grad in enumerate(grads):
            steps = before.get(("step", i), torch.tensor(0.0))
            if grad is not None and not skipped:
                assert after["step", i] == steps + 1, f"the step counter of parameter {i}"
                continue
            for key, value in before.items():
                if key[1:] == (i,) and key in after and same_type(value, after[key]):
                    assert_equal({key: after[key]}, {key: value}, "without a step")
        for key, (value, limit) in expected.items():
            error = (after[key].reshape(-1).double() - value).abs()
            worst = (error / limit).max().item() if error.numel() else 0.0
            assert worst <= 1, f"{key} is {worst:.2f} limits from float64"

    def in_float64(self, grads: Grads) -> dict[Any, tuple[Tensor, Tensor]]:
        """The float64 results of the next step for fp32 weights and states, with their limits.

        A limit is the sum of three terms: 2 eps of the value, as in tests/test_oracle.py; 8 eps of
        the change, which about ten rounded operations and constants make, with half an eps each;
        and 4 times the largest effect of changing gradient, weight and states by 1 eps, because a
        sum that cancels amplifies the rounding of its terms.
        """
        optimizer, expected = self.plain.optimizer, {}
        if optimizer.skip_nonfinite and nonfinite(grads):
            return expected
        factor = 1.0
        if optimizer.max_grad_norm is not None:
            norm = max(
                (float(g.abs().max()) for g in grads if g is not None and g.numel()), default=0
            )
            factor = min(1.0, optimizer.max_grad_norm / (norm + 1e-6))
        for i, (p, group, grad) in enumerate(
            zip(self.plain.params, self.plain.groups, grads, strict=True)
        ):
            if grad is None:
                continue
            state = dict(optimizer.state.get(p, {}))
            begun, rule = i in self.begun, self.case.name
            if group.get("momentum"):
                self.begun.add(i)
            if rule == "sgd" and not begun:
                state.pop("momentum_buffer", None)
            step, ema = int(state.pop("step", 0)), state.pop("ema", p.detach())
            numbers = {
                scalar.key: state.pop(scalar.key, torch.tensor(scalar.starts_at)).double()
                for scalar in self.case.ours.rule.scalar_states
            }
            floats = all(s.dtype.is_floating_point and s.shape == p.shape for s in state.values())
            if option(group, "states") != "fp32" or p.dtype != torch.float32 or not floats:
                continue
            named = {**DEFAULTS, **group}
            options = {k: float(v) if isinstance(v, Tensor) else v for k, v in named.items()}
            names = ["parameter", *state]
            given = [p.detach(), *state.values(), factor * grad.double()]
            signs = torch.tensor(list(itertools.product((-1, 1), repeat=len(given)))).double().T
            scales = torch.cat([torch.ones(len(given), 1), 1 + EPS * signs], 1)
            rows = [
                s[:, None] * v.double().reshape(1, -1) for s, v in zip(scales, given, strict=True)
            ]
            oracle = Oracle(rule, rows[0], options, self.case.direction)
            oracle.t, oracle.s = (
                step,
                dict(zip(names[1:], (r.clone() for r in rows[1:-1]), strict=True)) | numbers,
            )
            oracle.step(rows[-1])
            oracle.s = {name: value for name, value in oracle.s.items() if name not in numbers}
            for name, value in {"parameter": oracle.p, **oracle.s}.items():
                old = rows[names.index(name)][0] if name in names else torch.zeros_like(value[0])
                limit = 2 * EPS * torch.maximum(old.abs(), value[0].abs())
                limit += 8 * EPS * (value[0] - old).abs() + TINY
                limit += 4 * (value - value[0]).abs().amax(0)
                expected[name, i] = value[0], limit
            if option(group, "ema_decay") is not None:
                decay, (new, limit) = group["ema_decay"], expected["parameter", i]
                old = ema.double().reshape(-1)
                value = decay * old + (1 - decay) * new
                expected["ema", i] = value, limit + 2 * EPS * (old.abs() + new.abs())
        return expected


def same_type(a: Any, b: Any) -> bool:
    """Whether two values can be compared; a state that has been converted cannot."""
    return not isinstance(a, Tensor) or (a.dtype == b.dtype and a.shape == b.shape)
