"""Conformance with torch.optim over optim_db, the table of inputs of torch's own optimizer tests.

Each optimizer input and each error input of torch.optim.SGD, Adagrad, RMSprop, Adam and AdamW runs
with the onepass class of the same name. EXCEPTIONS lists where onepass differs, with the reason.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings

import hypothesis
import pytest
import torch

import onepass

from .cases import clone, make_params

pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest")
# The import loads a hypothesis profile of torch, which would also apply to the other tests.
_profile = hypothesis.settings.get_current_profile_name()
common_optimizers = importlib.import_module("torch.testing._internal.common_optimizers")
hypothesis.settings.load_profile(_profile)

EXCEPTIONS = {
    (
        "Adam",
        "params=None",
    ): "A tensor lr or beta is accepted with foreach=True, so params comes next.",
    ("AdamW", "params=None"): "As for Adam.",
    ("*", "differentiable=True"): "The step runs in kernels that autograd does not record.",
    ("*", "strides with gaps"): "Kernels walk the memory of a parameter in order.",
    ("*", "float64 parameter"): "Kernels compute in float32.",
    ("*", "complex parameter"): "No rule is defined for complex numbers.",
    ("*", "meta parameter"): "A step needs memory to update.",
    ("SGD", "sparse gradient"): "Kernels read dense gradients only.",
    ("Adagrad", "sparse gradient"): "Kernels read dense gradients only.",
    ("Adam", "lr as Tensor doesn't work with foreach & not capturable"): (
        "The step is always fused and capturable, so it accepts a tensor lr with foreach=True."
    ),
    ("AdamW", "lr as Tensor doesn't work with foreach & not capturable"): (
        "The step is always fused and capturable, so it accepts a tensor lr with foreach=True."
    ),
    ("Adam", "betas must be either both floats or both Tensors"): "Each beta is read by itself.",
    ("AdamW", "betas must be either both floats or both Tensors"): "Each beta is read by itself.",
    ("Adam", r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True"): (
        "The step is always fused and capturable, so it accepts tensor betas with foreach=True."
    ),
    ("AdamW", r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True"): (
        "The step is always fused and capturable, so it accepts tensor betas with foreach=True."
    ),
}
"""(class or "*" for all five, description of the input): why onepass differs from torch.optim.

Descriptions are those of optim_db, or of the other cases in this file. A test fails if an exception
no longer occurs.
"""

NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")
INFOS = {
    info.optim_cls.__name__: info
    for info in common_optimizers.optim_db
    if info.optim_cls in {getattr(torch.optim, name) for name in NAMES}
}
INPUTS = [(name, i) for name in NAMES for i in INFOS[name].optim_inputs_func(device="cpu")]
ERRORS = [
    (name, e)
    for name in NAMES
    for e in INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)
]
BACKEND = {"backend": "cpu"}


def param():
    return torch.nn.Parameter(torch.ones(3))


def settle(name: str, description: str, difference: str | None) -> None:
    """Asserts that a difference is None, or that it is not None if EXCEPTIONS lists the case."""
    listed = {(name, description), ("*", description)} & EXCEPTIONS.keys()
    if listed:
        assert difference is not None, f"remove {listed} from EXCEPTIONS: onepass is as torch.optim"
    else:
        assert difference is None, difference


def raised(make, expected=()) -> BaseException | None:
    """The error of a call, or its warning if a class of warnings is expected, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(expected, type) and issubclass(expected, Warning):
            warnings.simplefilter("error", expected)
        try:
            make()
        except Exception as error:
            return error
    return None


def unlike(error: BaseException | None, expected: type) -> str | None:
    """Describes an error that is not of the expected type; None if it is."""
    return None if isinstance(error, expected) else f"expected {expected.__name__}, got {error!r}"


# --- optimizer inputs ------------------------------------------------------------------------


def start(name, kwargs):
    """onepass in float32, torch.optim in float32 and in float64, each with its parameters."""
    params = make_params([(4099,), (64, 33), (3,), (), (0,)], torch.float32, seed=5)
    double = [torch.nn.Parameter(p.detach().double()) for p in params]
    theirs = getattr(torch.optim, name)
    return [
        (make(ps, **copy.deepcopy(kwargs), **options), ps)
        for make, ps, options in (
            (getattr(onepass, name), params, BACKEND),
            (theirs, clone(params), {}),
            (theirs, double, {}),
        )
    ]


def steps(runs, count):
    generator = torch.Generator().manual_seed(7)
    shapes = [p.shape for p in runs[0][1]]
    for _ in range(count):
        grads = [torch.randn(shape, generator=generator) + 0.1 for shape in shapes]
        for optimizer, params in runs:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.to(p.dtype)
            optimizer.step()


def flat(params):
    return torch.cat([p.detach().double().flatten() for p in params])


def input_id(value):
    return value if isinstance(value, str) else value.desc


@pytest.mark.parametrize(("name", "given"), INPUTS, ids=input_id)
def test_weights_are_as_near_to_float64_as_torchs(name, given):
    """The limit is that of test_oracle.py, for the RMS error relative to the RMS of the update.

    The error may be 1.1 times that of torch.optim in float32, or 1e-6, because a beta rounded to
    float32 is off by 3e-8.
    """
    runs = start(name, given.kwargs)
    before = flat(runs[0][1])
    steps(runs, 50)
    ours, theirs, exact = (flat(params) for _, params in runs)
    update = (exact - before).square().mean().sqrt()
    assert update > 0
    error, limit = (float((x - exact).square().mean().sqrt() / update) for x in (ours, theirs))
    difference = f"error {error:.1e}, torch.optim {limit:.1e}"
    settle(name, given.desc, None if error <= max(1.1 * limit, 1e-6) else difference)


@pytest.mark.parametrize(("name", "given"), INPUTS, ids=input_id)
def test_state_keys_are_torchs(name, given):
    runs = start(name, given.kwargs)
    steps(runs, 2)
    ours, theirs = (optimizer.state_dict()["state"] for optimizer, _ in runs[:2])
    found, expected = (
        {i: sorted(state[i]) for i in range(5)} if state else {} for state in (ours, theirs)
    )
    settle(name, "state keys", None if found == expected else f"{found} is not {expected}")


@pytest.mark.parametrize(("name", "given"), INPUTS, ids=input_id)
def test_group_keys_are_torchs(name, given):
    ours, theirs = (
        optimizer.state_dict()["param_groups"][0] for optimizer, _ in start(name, given.kwargs)[:2]
    )
    extra, missing = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    difference = f"extra {extra}, missing {missing}" if extra or missing else None
    settle(name, "group keys", difference)


# --- choices of an implementation ---

FLAGS = [
    (name, flag, value)
    for name in NAMES
    for flag, values in {
        "foreach": (None, False, True),
        "fused": (None, False, True),
        "capturable": (False, True),
        "differentiable": (False,),
    }.items()
    if flag in inspect.signature(getattr(torch.optim, name)).parameters
    for value in values
]


@pytest.mark.parametrize(("name", "flag", "value"), FLAGS)
def test_a_choice_of_implementation_is_accepted_and_kept(name, flag, value):
    make = getattr(onepass, name)
    plain, chosen = param(), param()
    optimizers = make([plain], **BACKEND), make([chosen], **{flag: value}, **BACKEND)
    for p, optimizer in zip((plain, chosen), optimizers, strict=True):
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(plain, chosen)
    assert optimizers[1].param_groups[0][flag] is value
    assert optimizers[1].state_dict()["param_groups"][0][flag] is value


@pytest.mark.parametrize("name", NAMES)
def test_differentiable_is_a_value_error(name):
    with pytest.raises(ValueError, match="differentiable"):
        getattr(onepass, name)([param()], differentiable=True)


# --- error inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    ERRORS,
    ids=lambda x: x if isinstance(x, str) else x.optimizer_error_input.desc,
)
def test_an_error_input_is_an_error_of_the_same_type(name, given):
    """Where optim_db has params=None, the test passes a parameter; the next test passes None."""
    wrong, kind = given.optimizer_error_input, given.error_type
    in_step = given.error_on is common_optimizers.OptimizerErrorEnum.STEP_ERROR

    def run(make):
        given_params = [param()] if wrong.params is None else wrong.params
        kwargs = copy.deepcopy(wrong.kwargs)
        if not in_step:
            return raised(lambda: make(given_params, **kwargs), kind)
        optimizer = make(given_params, **kwargs)
        return raised(optimizer.step, kind)

    assert unlike(run(getattr(torch.optim, name)), kind) is None, "optim_db is not as described"
    settle(name, wrong.desc, unlike(run(getattr(onepass, name)), kind))


@pytest.mark.parametrize("name", NAMES)
def test_options_are_checked_before_params(name):
    bad = [e for n, e in ERRORS if n == name and e.optimizer_error_input.params is None]
    assert bad
    errors = [
        unlike(
            raised(lambda e=e: getattr(onepass, name)(None, **e.optimizer_error_input.kwargs)),
            e.error_type,
        )
        for e in bad
    ]
    found = [error for error in errors if error is not None]
    settle(name, "params=None", "; ".join(found) or None)


# --- kinds of parameters and gradients -------------------------------------------------------


def stepped(make, tensor, grad=None, **options):
    """Constructs an optimizer of one parameter and steps it."""
    p = torch.nn.Parameter(tensor)
    optimizer = make([p], **options)
    p.grad = torch.ones_like(p) if grad is None else grad
    optimizer.step()


KINDS = {
    "differentiable=True": lambda make: make([param()], differentiable=True),
    "strides with gaps": lambda make: stepped(make, torch.ones(4, 4)[:, ::2]),
    "overlapping strides": lambda make: stepped(make, torch.ones(1).expand(3)),
    "transposed": lambda make: stepped(make, torch.ones(3, 4).t()),
    "channels last": lambda make: stepped(
        make, torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ),
    "no dimensions": lambda make: stepped(make, torch.tensor(1.0)),
    "no elements": lambda make: stepped(make, torch.ones(0)),
    "bfloat16 parameter": lambda make: stepped(make, torch.ones(3, dtype=torch.bfloat16)),
    "float16 parameter": lambda make: stepped(make, torch.ones(3, dtype=torch.float16)),
    "float64 parameter": lambda make: stepped(make, torch.ones(3, dtype=torch.float64)),
    "complex parameter": lambda make: stepped(make, torch.ones(3, dtype=torch.complex64)),
    "meta parameter": lambda make: stepped(make, torch.ones(3, device="meta")),
    "sparse gradient": lambda make: stepped(make, torch.ones(3), torch.ones(3).to_sparse()),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_parameters_are_accepted_as_by_torch(name, kind):
    theirs, ours = (
        raised(lambda lib=lib: KINDS[kind](getattr(lib, name))) for lib in (torch.optim, onepass)
    )
    same = (theirs is None) == (ours is None)
    settle(name, kind, None if same else f"torch.optim: {theirs!r}; onepass: {ours!r}")


def test_every_exception_names_a_case():
    cases = {(name, i.desc) for name, i in INPUTS}
    cases |= {(name, e.optimizer_error_input.desc) for name, e in ERRORS}
    others = (*KINDS, "params=None", "state keys", "group keys")
    cases |= {(name, other) for name in (*NAMES, "*") for other in others}
    assert EXCEPTIONS.keys() <= cases
