"""Arguments that callers of torch.optim, bitsandbytes and others pass are accepted or refused.

The error of a refused argument names the equivalent in onepass.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import onepass

CLASSES = [onepass.SGD, onepass.Adagrad, onepass.RMSprop, onepass.Adam, onepass.AdamW]
ALL = [*CLASSES, onepass.Lion, onepass.AdamW8bit, onepass.PagedAdam8bit]


def param(*shape, dtype=torch.float32):
    made = torch.nn.Parameter(torch.ones(*shape or (3,), dtype=dtype))
    made.grad = torch.ones_like(made)
    return made


# --- keywords -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    "given",
    [
        {"foreach": True},
        {"foreach": False, "fused": None},
        {"fused": True},
        {"capturable": True},
        {"differentiable": False},
    ],
    ids=str,
)
def test_keywords_of_torch_are_accepted(cls, given):
    weight = param()
    optimizer = cls([{"params": [weight], **given}], lr=0.1, **given)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.scales_in_step == bool(given.get("fused"))
    assert weight[0] < 1


@pytest.mark.parametrize("cls", ALL)
def test_differentiable_is_refused_by_name(cls):
    with pytest.raises(ValueError, match="differentiable must be False"):
        cls([param()], differentiable=True)
    optimizer = cls([param()], lr=0.1)
    optimizer.param_groups[0]["differentiable"] = True
    with pytest.raises(ValueError, match="differentiable must be False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"optim_bits": 8}, r"has no keyword 'optim_bits'; the equivalent in onepass: states="),
        ({"is_paged": True}, "paged=True"),
        ({"min_8bit_size": 4096}, "parameter_groups"),
        ({"percentile_clipping": 5}, "max_grad_norm"),
        ({"block_wise": True}, "states="),
        ({"master_weight_bits": 24}, "weights="),
        ({"sates": "mx8"}, "did you mean 'states'"),
        ({"colour": "red"}, "Its keywords: amsgrad, backend"),
    ],
)
def test_unknown_keywords_name_the_equivalent(given, answer):
    with pytest.raises(TypeError, match=answer):
        onepass.AdamW([param()], **given)


@pytest.mark.parametrize("cls", ALL)
def test_signature_and_docstring_show_every_keyword(cls):
    parameters = inspect.signature(cls).parameters
    for name in onepass.optim.Options.__annotations__:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY or name == "maximize"
        assert f"{name}" in cls.__doc__
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name, value in parameters.items():
        if name not in ("params", "lr", "paged", "states") and value.default is not value.empty:
            cls([param()], **{name: value.default})


# --- groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(onepass.optim.keywords.STEP_WIDE))
def test_options_of_the_whole_step_are_refused_in_a_group(name):
    value = {"max_grad_norm": 1.0, "norm_type": 2.0, "backend": "cpu"}.get(name, True)
    with pytest.raises(ValueError, match=f"{name} is an option of the whole step"):
        onepass.SGD([{"params": [param()], name: value}], lr=0.1)
    optimizer = onepass.SGD([param()], lr=0.1)
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [param()], name: value})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=name):
        optimizer.step()


def test_the_table_of_keywords_is_the_documented_list():
    rows = [keyword.name for keyword in onepass.optim.keywords.KEYWORDS]
    assert len(rows) == len(set(rows))
    assert set(rows) == onepass.optim.Options.__annotations__.keys()
    text = onepass.optim.Options.__doc__
    assert [name for name in rows if name not in text] == []


def test_foreign_keys_stay_and_misspelt_ones_are_refused():
    kept = {"initial_lr": 0.1, "max_lr": 1.0, "lr_scale": 0.5, "name": "head", "layer": 3}
    optimizer = onepass.AdamW([{"params": [param()], **kept}], lr=0.1)
    optimizer.step()
    assert kept.items() <= optimizer.param_groups[0].items()
    assert kept.items() <= optimizer.state_dict()["param_groups"][0].items()
    for name in ("sates", "weigths", "max_grad_nrm", "weight_decays"):
        with pytest.raises(ValueError, match=rf"{name!r}; did you mean"):
            onepass.AdamW([{"params": [param()], name: 1}], lr=0.1)


@pytest.mark.parametrize("cls", CLASSES)
def test_groups_have_the_keys_of_torch(cls):
    theirs = getattr(torch.optim, cls.__name__)([param()], lr=0.1)
    ours = cls([param()], lr=0.1)
    expected = theirs.param_groups[0].keys()
    assert ours.param_groups[0].keys() == expected
    ours.step()
    assert ours.state_dict()["param_groups"][0].keys() == expected
    named = cls([param(dtype=torch.bfloat16)], lr=0.1, states="mx8", weights="kahan", seed=7)
    added = named.state_dict()["param_groups"][0].keys() - expected
    assert added == {"states", "weights", "seed", "format_version"}


def test_repr_shows_options_of_the_whole_step():
    assert "max_grad_norm: 2.5" in repr(onepass.AdamW([param()], max_grad_norm=2.5))
    assert "Whole step" not in repr(onepass.AdamW([param()]))


# --- parameters ---------------------------------------------------------------------------------


def test_frozen_parameters_may_be_of_any_dtype():
    """A model with adapters has frozen parameters with quantized weights."""
    model = torch.nn.ParameterDict(
        {
            "packed": torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False),
            "int8": torch.nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False),
            "wide": torch.nn.Parameter(torch.zeros(8, dtype=torch.float64), requires_grad=False),
            "adapter": param(dtype=torch.bfloat16),
        }
    )
    for params in (list(model.values()), onepass.parameter_groups(model)):
        optimizer = onepass.AdamW(params, lr=0.1, states="mx8", weights="split8")
        optimizer.step()
        assert len(optimizer.state) == 1


def test_parameters_of_lazy_modules():
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.LazyLinear(2))
    optimizer = onepass.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3, 5)).sum().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_strides_with_gaps_are_refused_by_the_constructor():
    with pytest.raises(ValueError, match="leave gaps"):
        onepass.SGD([torch.nn.Parameter(torch.ones(8)[::2])], lr=0.1)


# --- scaling and hooks --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_of_torch_skips_the_call_unless_fused(fused):
    weight = param()
    optimizer = onepass.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale((weight * (float("inf") if overflow else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert len(calls) == (2 if fused else 1)
    assert optimizer.state[weight]["step"] == 1


def test_the_onepass_scaler_scales_in_the_step_only_during_its_call():
    weight = param()
    optimizer = onepass.AdamW([weight])
    scaler = onepass.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert not optimizer._step_supports_amp_scaling
    assert optimizer.state[weight]["step"] == 1


def test_functions_take_the_optimizer_inside_a_wrapper():
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def __repr__(self):
            return "Wrapped"

    model = torch.nn.Linear(2, 2)
    optimizer = onepass.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    wrapped = Wrapped(optimizer)
    assert onepass.full_precision_state_dict(model, wrapped).keys() == model.state_dict().keys()
    assert onepass.convert_state_dict(wrapped, optimizer.state_dict(), states="fp32")
    assert onepass.to_bitsandbytes(wrapped)
    onepass.release_gradients(model, wrapped).remove()
    other = torch.optim.AdamW(model.parameters())
    for call in (
        lambda: onepass.full_precision_state_dict(model, other),
        lambda: onepass.convert_state_dict(other, {}),
        lambda: onepass.to_bitsandbytes(other),
        lambda: onepass.release_gradients(model, other),
    ):
        with pytest.raises(TypeError, match=r"must be an optimizer of onepass; got torch\.optim"):
            call()


# --- torch.distributed.checkpoint ---------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(make, steps=3, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(64, 8)
    optimizer = make(model.parameters())
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()


def exchange(source, target, flat, planner=None):
    """Saves one optimizer and loads it strictly into another.

    Returns:
        The largest difference between the weights of both after three more steps.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = trained(source)
    where = tempfile.mkdtemp()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=where)
    other, loaded = trained(target, steps=0, seed=1)
    other.load_state_dict(model.state_dict())
    state = {"optimizer": get_optimizer_state_dict(other, loaded, options=options)}
    dcp.load(state, checkpoint_id=where, planner=planner)
    set_optimizer_state_dict(other, loaded, state["optimizer"], options=options)
    train(model, optimizer, range(3, 6))
    train(other, loaded, range(3, 6))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("name", "given"),
    [(cls.__name__, {}) for cls in CLASSES]
    + [("SGD", {"momentum": 0.9, "dampening": 0.5}), ("RMSprop", {"momentum": 0.9})],
)
@pytest.mark.usefixtures("one_rank")
def test_checkpoints_go_between_torch_and_onepass(name, given, flat):

    def theirs(params):
        return getattr(torch.optim, name)(params, lr=1e-2, **given)

    def ours(params):
        return getattr(onepass, name)(params, lr=1e-2, **given)

    for source, target in ((theirs, ours), (ours, theirs), (ours, ours)):
        assert exchange(source, target, flat) < 1e-6


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: onepass.AdamW(params, states="mx8", seed=7),
        lambda params: onepass.AdamW(params, ema_decay=0.9),
        lambda params: onepass.SGD(params, momentum=0.9, decoupled_weight_decay=True),
        lambda params: onepass.Adagrad(params, eps_in_sqrt=True),
        lambda params: onepass.Lion(params, states="mx4"),
    ],
    ids=["seed", "ema", "decoupled", "eps_in_sqrt", "lion"],
)
@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_with_options_of_onepass_resumes(make, flat):
    assert exchange(make, make, flat) == 0


@pytest.mark.parametrize("states", ["mx8", "mx4", "dynamic8"])
@pytest.mark.usefixtures("one_rank")
def test_a_partial_load_of_fp32_moments_over_codes_is_refused(states):
    def ours(params):
        return onepass.AdamW(params, lr=1e-2)

    def blocks(params):
        return onepass.AdamW(params, lr=1e-2, states=states)

    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    with pytest.raises((ValueError, RuntimeError, dcp.api.CheckpointException)):
        exchange(ours, blocks, False, planner)
