"""A step either completes or changes nothing: errors, Ctrl-C and failing launches."""

from __future__ import annotations

import copy
import pickle
import signal
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS

from .cases import assert_same, make_params, same_bits, set_grads
from .support.thorough import THOROUGH
from .test_plan import BACKENDS as NAMES

PACKAGE = str(Path(onepass.__file__).parent)


@pytest.fixture(params=NAMES)
def backend(request):
    return request.param


def build(backend=None, cls=onepass.AdamW, states="fp32", **options):
    """An optimizer with two groups of two parameters each, which have gradients."""
    params = make_params([(7,), (3, 5), (33,), (2,)], torch.float32, 1)
    set_grads(params, torch.float32, 0)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    return params, cls(groups, lr=0.1, states=states, backend=backend, **options)


def snapshot(params, optimizer):
    """Copies of all tensors that a step changes."""
    kept = [param.detach().clone() for param in params]
    for param in params:
        state = dict.get(optimizer.state, param, {})
        kept += [value.clone() for value in state.values() if isinstance(value, torch.Tensor)]
    return [*kept, optimizer.skipped_steps.clone()]


def same(a, b):
    """Whether two snapshots are equal; counters may be int64 and norms float64."""
    return len(a) == len(b) and all(
        torch.equal(x, y) if x.dtype.itemsize == 8 else same_bits(x, y)
        for x, y in zip(a, b, strict=True)
    )


# --- errors before the sweep --------------------------------------------------------------------


def counter(value):
    def change(params, optimizer):
        if params[2] not in optimizer.state:
            optimizer.step()
        optimizer.state[params[2]]["step"] = torch.tensor(value)

    return change


def counter_in_place(params, optimizer):
    optimizer.state[params[2]]["step"].fill_(float("nan"))


def option(**options):
    return lambda params, optimizer: optimizer.param_groups[1].update(options)


MISTAKES = {
    "counter NaN": counter(float("nan")),
    "counter infinite": counter(float("inf")),
    "counter -1": counter(-1.0),
    "counter -2": counter(-2.0),
    "counter 2.5": counter(2.5),
    "counter of two": counter([1.0, 2.0]),
    "counter in place": counter_in_place,
    "lr negative": option(lr=-1.0),
    "lr a word": option(lr="fast"),
    "betas": option(betas=(0.9, 1.5)),
    "betas of one": option(betas=0.9),
    "eps": option(eps=float("nan")),
    "weight_decay": option(weight_decay=-1.0),
    "states": option(states="mx9"),
    "weights": option(weights="split8"),
    "seed": option(seed=-1),
    "ema_decay": option(ema_decay=2.0),
}


# The mistakes that `make test` also makes with clipping in Triton's interpreter.
CLIPPED = [MISTAKES[name] for name in ("counter -1", "lr negative", "states", "ema_decay")]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=["", "clipped"])
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_an_error_before_the_sweep_changes_nothing(backend, mistake, options):
    if backend == "triton" and options and mistake not in CLIPPED and not THOROUGH:
        pytest.skip("the interpreter is slow: make test-all runs every mistake with clipping")
    if backend == "triton" and mistake is counter_in_place:
        pytest.skip("as on a GPU, the host does not read counters")
    params, optimizer = build(backend, **options)
    optimizer.step()
    groups = copy.deepcopy(
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    )
    step = optimizer.state[params[2]]["step"].clone()
    mistake(params, optimizer)
    before = snapshot(params, optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"step|lr|betas|eps|decay|states|weights|seed"):
            optimizer.step()
        assert same(snapshot(params, optimizer), before)
    # After the mistake is undone, the next step equals that of an optimizer without the mistake.
    for group, old in zip(optimizer.param_groups, groups, strict=True):
        for key in group.keys() - {"params"} - old.keys():
            del group[key]
        group.update(old)
    for param in params[2:]:
        optimizer.state[param]["step"] = step.clone()
    optimizer.step()
    others, twin = build(backend, **options)
    twin.step()
    twin.step()
    assert_same(optimizer, twin)
    assert all(map(same_bits, params, others))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_scalar_state_that_is_not_finite_is_refused(backend, value):
    params, optimizer = build(backend, onepass.NAdam)
    optimizer.step()
    optimizer.state[params[2]]["mu_product"] = torch.tensor(value)
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match="mu_product"):
        optimizer.step()
    assert same(snapshot(params, optimizer), before)


def test_a_mistake_in_the_first_step_leaves_no_state(backend):
    _params, optimizer = build(backend)
    optimizer.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert len(optimizer.state) == 0


# --- Ctrl-C -------------------------------------------------------------------------------------


@cache
def with_lines(path):
    """The numbers of the lines of a file that start a `with` statement."""
    lines = enumerate(Path(path).read_text().splitlines(), start=1)
    return {number for number, line in lines if line.lstrip().startswith("with ")}


class Interrupt:
    """Sends SIGINT at the n-th line of the package that runs."""

    def __init__(self, at):
        self.left = at
        self.entered = set()  # the `with` statements whose blocks are running

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not self._leaves_with(frame):
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self

    def _leaves_with(self, frame):
        """Whether a `with` statement is about to call __exit__.

        Python reports this line a second time then, but runs signal handlers only after the call.
        """
        if frame.f_lineno not in with_lines(frame.f_code.co_filename):
            return False
        place = frame, frame.f_lineno
        again = place in self.entered
        self.entered ^= {place}
        return again

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def step(params, optimizer, seed):
    set_grads(params, torch.float32, seed)
    optimizer.step()


def interrupted(make, at, steps):
    """Takes `steps` steps, then another one that is interrupted at the at-th line.

    Returns:
        Whether the step was interrupted, the snapshot before it, the parameters, the optimizer.
    """
    params, optimizer = make()
    for number in range(steps):
        step(params, optimizer, number)
    before = snapshot(params, optimizer)
    set_grads(params, torch.float32, steps)
    try:
        with Interrupt(at) as interrupt:
            optimizer.step()
    except KeyboardInterrupt:
        pass
    assert torch._C._is_torch_function_enabled(), f"torch functions are off after line {at}"
    assert torch.is_grad_enabled(), f"autograd is off after an interrupt at line {at}"
    return interrupt.left <= 0, before, params, optimizer


KINDS = {
    "adamw": {},
    "clipped": {"max_grad_norm": 0.1, "skip_nonfinite": True, "zero_grads": True},
    "averaged": {"ema_decay": 0.9},
    "mx8": {"states": "mx8"},
    "paged": {"paged": True},
    "reference": {"backend": "reference"},
}


# Each kind of step is interrupted at every STRIDE-th line, starting from a different line.
STRIDE = 1 if THOROUGH else 37
# The first step, and a later one; `make test` interrupts only one of them per kind, in turn.
INTERRUPTED = [
    pytest.param(kind, steps, id=f"{kind}-{name}")
    for i, kind in enumerate(KINDS)
    for steps, name in enumerate(("first", "later"))
    if THOROUGH or i % 2 == steps
]


@pytest.fixture
def python_handles_sigint():
    """Python's own handler, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_sigint")
@pytest.mark.parametrize(("kind", "steps"), INTERRUPTED)
def test_ctrl_c_at_any_line_leaves_a_whole_step(kind, steps):
    def make():
        return build(**KINDS[kind])

    others, twin = make()
    for number in range(steps + 1):
        step(others, twin, number)
    after = snapshot(others, twin)
    step(others, twin, 5)
    outcomes = set()
    first = (2 * list(KINDS).index(kind) + steps) % STRIDE
    for at in range(1 + first, 10_000, STRIDE):
        came, before, params, optimizer = interrupted(make, at, steps)
        if not came:
            break
        now = snapshot(params, optimizer)
        taken = same(now, after)
        outcomes.add(taken)
        assert taken or same(now, before), f"half a step at line {at}"
        # The optimizer works normally afterwards.
        if not taken:
            step(params, optimizer, steps)
        step(params, optimizer, 5)
        assert_same(optimizer, twin)
    assert outcomes == {False, True}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigint_of_other_threads_and_handlers():
    """A step in another thread does not defer SIGINT, a user's handler runs after the step, and an
    ignored SIGINT stays ignored."""
    params, optimizer = build()
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    assert optimizer.state[params[0]]["step"] == 1
    seen = []
    old = signal.signal(signal.SIGINT, lambda *args: seen.append(float(params[0].detach()[0])))
    try:
        run = BACKENDS["cpu"].run if not onepass.ops.missing else BACKENDS["reference"].run
        backend = run.__self__

        def interrupting(*args):
            signal.raise_signal(signal.SIGINT)
            run(*args)

        backend.run = interrupting
        try:
            optimizer.step()
        finally:
            del backend.run
        assert seen == [float(params[0].detach()[0])]
        assert optimizer.state[params[0]]["step"] == 2
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        optimizer.step()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


# --- failing sweeps -----------------------------------------------------------------------------


class Fault(Exception):
    pass


class Failing:
    """Makes the run method of a backend raise, before or after the sweep."""

    def __init__(self, monkeypatch, name, after):
        backend = BACKENDS[name]
        run = type(backend).run

        def failing(*args, **options):
            if after:
                run(backend, *args, **options)
            raise Fault("the launch")

        monkeypatch.setattr(backend, "run", failing, raising=False)


def test_a_launch_that_fails_leaves_the_step_uncounted(monkeypatch):
    """Applies to backends whose run is one launch, as on a GPU."""
    name = "triton"
    if name not in NAMES:
        pytest.skip("Triton's interpreter is not used here")
    for cls in (onepass.AdamW, lambda *a, **k: onepass.SGD(*a, momentum=0.9, dampening=0.5, **k)):
        for steps in (0, 1):
            params, optimizer = build(name, cls)
            for _ in range(steps):
                optimizer.step()
            before = snapshot(params, optimizer)
            with monkeypatch.context() as context:
                Failing(context, name, after=False)
                with pytest.raises(Fault):
                    optimizer.step()
            assert same(snapshot(params, optimizer), before)
            _others, twin = build(name, cls)
            for _ in range(steps + 1):
                twin.step()
            optimizer.step()
            assert_same(optimizer, twin)


@pytest.mark.parametrize("how", ["later", "loaded", "copied"])
def test_a_sweep_that_fails_midway_refuses_further_steps(monkeypatch, how):
    params, optimizer = build("reference")
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [param.detach().clone() for param in params]
    with monkeypatch.context() as context:
        Failing(context, "reference", after=True)
        with pytest.raises(Fault):
            optimizer.step()
    if how == "copied":
        optimizer = copy.deepcopy(optimizer)
        optimizer = pickle.loads(pickle.dumps(optimizer))
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"load a checkpoint.*load_state_dict.*the launch"):
            optimizer.step()
    if how == "loaded":
        with torch.no_grad():
            for param, weight in zip(params, weights, strict=True):
                param.copy_(weight)
        optimizer.load_state_dict(saved)
        optimizer.step()
        _, twin = build("reference")
        twin.step()
        twin.step()
        assert_same(optimizer, twin)


def test_a_plan_that_failed_is_not_kept(monkeypatch):
    for name in NAMES:
        _, optimizer = build(name)
        optimizer.step()
        with monkeypatch.context() as context:
            Failing(context, name, after=False)
            with pytest.raises(Fault):
                optimizer.step()
        assert optimizer._plan is None
