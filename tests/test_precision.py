"""Training in 16 bits: cast_model, parameter_groups, full_precision_state_dict, 8-bit names."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import onepass
from onepass.formats import STATE_FORMATS, WEIGHT_FORMATS

from .cases import assert_same, make_params, same_bits, set_grads, train
from .test_plan import BACKENDS

BF16 = torch.bfloat16
WEIGHTS = [name for name, form in WEIGHT_FORMATS.items() if form.key]


class MyNorm(nn.LayerNorm):
    """A subclass of LayerNorm, which cast_model must recognize as a LayerNorm."""


class Model(nn.Module):
    """A model with an embedding tied to the output, two kinds of norms and several buffers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(MyNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2)
        )
        self.last = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.full((8,), 1.001))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("angles", torch.linspace(0, 1, 8))
        self.register_buffer("positions", torch.arange(8))
        self.register_buffer("phases", torch.ones(8, dtype=torch.complex64))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x) * self.scale.to(x.dtype)
        return self.head(self.last(x.flatten(0, 1)))


def is_norm(name):
    return name.startswith("last.") or name.split(".")[2:3] == ["0"]


TOKENS = torch.arange(12).reshape(3, 4) % 11


def dtypes(model):
    return {name: t.dtype for name, t in model.state_dict().items()}


# --- cast_model ---


def test_norms_stay_in_fp32_by_type_and_the_rest_is_cast():
    model = Model()
    params = dict(model.named_parameters())
    assert onepass.cast_model(model, BF16) is model
    found = dtypes(model)
    for name, dtype in found.items():
        if name in ("positions", "last.num_batches_tracked"):
            expected = torch.int64
        elif name == "phases":
            expected = torch.complex64
        else:
            expected = torch.float32 if is_norm(name) else BF16
        assert dtype == expected, name
    assert model.head.weight is model.embedding.weight
    assert all(params[name] is p for name, p in model.named_parameters())


def test_a_cast_model_trains():
    torch.manual_seed(0)
    model = onepass.cast_model(Model(), BF16)
    out = model(TOKENS)
    assert out.dtype == BF16
    out.float().square().mean().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    onepass.AdamW(onepass.parameter_groups(model), states="mx8", weights="split8").step()


def test_a_kept_norm_computes_in_fp32():
    """The input and the output of a kept norm are bf16; the norm computes in fp32 between them."""
    model = onepass.cast_model(nn.Sequential(nn.LayerNorm(8)), BF16)
    exact = nn.LayerNorm(8)
    x = torch.randn(5, 8).to(BF16)
    seen = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert torch.equal(model(x), exact(x.float()).to(BF16))
    assert seen == [torch.float32]


def test_keep_takes_types_and_names_of_modules_parameters_and_buffers():
    model = onepass.cast_model(Model(), BF16, keep=(nn.BatchNorm1d, "blocks.1", "scale", "angles"))
    kept = {name for name, dtype in dtypes(model).items() if dtype == torch.float32}
    inside = {name for name in model.state_dict() if name.startswith(("blocks.1.", "last."))}
    assert kept == inside - {"last.num_batches_tracked"} | {"scale", "angles"}
    assert model(TOKENS).dtype == BF16
    model = onepass.cast_model(Model(), BF16, keep="blocks")  # a ModuleList is never called
    assert model(TOKENS).dtype == BF16
    assert set(dtypes(nn.ModuleList(model.blocks)).values()) == {torch.float32}


@pytest.mark.parametrize("keep", [(nn.Embedding,), ("head",), ("embedding.weight",)])
def test_a_tied_weight_is_kept_if_one_of_its_modules_is(keep):
    model = onepass.cast_model(Model(), BF16, keep=keep)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.dtype == torch.float32
    seen = []
    model.head.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    model(TOKENS).float().sum().backward()
    assert seen == [(torch.float32, BF16)]
    assert model.blocks[0][0].weight.dtype == BF16


def test_casting_again_applies_the_new_arguments():
    model, once = Model(), Model()
    once.load_state_dict(model.state_dict())
    onepass.cast_model(onepass.cast_model(model, BF16), BF16)
    onepass.cast_model(once, BF16)
    assert dtypes(model) == dtypes(once)
    assert torch.equal(model(TOKENS), once(TOKENS))
    onepass.cast_model(model, BF16, keep=())
    assert model.last.weight.dtype == BF16
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model(TOKENS).dtype == BF16
    onepass.cast_model(model, torch.float16)
    assert model.last.weight.dtype == torch.float32
    assert model(TOKENS).dtype == torch.float16


def test_gradients_strides_and_copies_of_a_cast_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    model.to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    onepass.cast_model(model, BF16)
    assert model[0].weight.stride() == strides
    assert (model[0].weight.grad.dtype, model[1].weight.grad.dtype) == (BF16, torch.float32)
    x = torch.randn(1, 3, 8, 8).to(BF16)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
        onepass.cast_model(copied, BF16, keep=())
        assert not copied[1]._forward_hooks
        assert model[1]._forward_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float32}, "dtype must be torch.bfloat16 or torch.float16; got torch.fl"),
        ({"keep": ("norms",)}, "keep names 'norms', but the model has no module, parameter or bu"),
        ({"keep": (3,)}, "keep must hold types of modules and names; got 3"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model = Model()
    before = dtypes(model)
    with pytest.raises(ValueError, match=message):
        onepass.cast_model(model, **arguments)
    assert dtypes(model) == before
    lazy = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"parameter '1.weight' has no shape yet"):
        onepass.cast_model(lazy)
    assert lazy[0].weight.dtype == torch.float32


# --- parameter_groups ---


def test_groups_hold_every_parameter_once_in_its_formats():
    model = onepass.cast_model(Model(), BF16)
    groups = onepass.parameter_groups(model)
    placed = [p for group in groups for p in group["params"]]
    assert len(placed) == len(set(placed)) == len(list(model.parameters()))
    where = {p: group for group in groups for p in group["params"]}
    for name, param in model.named_parameters():
        group = where[param]
        native = "native" if is_norm(name) else "split8"
        assert group.get("weights", "split8") == native, name
        special = is_norm(name) or name == "embedding.weight"
        assert group.get("states", "mx8") == ("fp32" if special else "mx8"), name
    optimizer = onepass.AdamW(groups, states="mx8", weights="split8")
    model(TOKENS).float().sum().backward()
    optimizer.step()
    assert optimizer.state[model.head.weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model.head.weight]["weight_low"].dtype == torch.int8
    assert optimizer.state[model.scale]["exp_avg"].dtype == torch.uint8
    assert "weight_low" not in optimizer.state[model.last.weight]


def test_fp32_states_chooses_the_groups():
    model = Model()
    (alone,) = onepass.parameter_groups(model, fp32_states=())
    assert alone["weights"] == "native"
    assert "states" not in alone
    first, second = onepass.parameter_groups(model, fp32_states=["head"])
    # named_parameters() yields the parameter of the model itself before the tied weight.
    assert first["params"][0] is model.scale
    assert second["params"] == [model.embedding.weight]
    with pytest.raises(ValueError, match="fp32_states names 'heads'"):
        onepass.parameter_groups(model, fp32_states=["heads"])


def test_a_weight_format_on_an_fp32_parameter_says_what_to_do():
    model = onepass.cast_model(Model(), BF16)
    message = (
        r"weights='split8' is for bfloat16 weights; parameter \d+ of the group, shape .* is "
        r"torch.float32: put it in a group with weights='native' \(onepass.parameter_groups"
    )
    with pytest.raises(ValueError, match=message):
        onepass.AdamW(model.parameters(), weights="split8")
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="with weights='native' or 'stochastic' or 'kahan' or 'ma"):
        onepass.AdamW([half], weights="split16")


# --- full_precision_state_dict ---


@pytest.mark.parametrize("weights", WEIGHTS)
def test_full_precision_weights_are_those_that_are_trained(weights):
    torch.manual_seed(0)
    exact = Model()
    for param in exact.parameters():
        param.data = param.data.to(BF16).float()
    model = onepass.cast_model(copy.deepcopy(exact), BF16)
    optimizer = onepass.AdamW(onepass.parameter_groups(model), lr=1e-4, weights=weights)
    twin = onepass.AdamW(onepass.parameter_groups(exact), lr=1e-4)
    for step in range(5):
        set_grads(list(model.parameters()), BF16, step)
        set_grads(list(exact.parameters()), BF16, step)
        optimizer.step()
        twin.step()
    before = copy.deepcopy(model.state_dict())
    full = onepass.full_precision_state_dict(model, optimizer)
    assert list(full) == list(model.state_dict())
    assert full._metadata == model.state_dict()._metadata
    assert full["head.weight"] is full["embedding.weight"]
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.dtype == BF16}
    # The relative rounding error of a weight over five steps: none, the 24th bit, or the last bit
    # of the Kahan compensation.
    eps = {"master": 0, "split16": 0, "split8": 2**-15, "kahan": 2**-17}[weights]
    for name, value in full.items():
        assert not value.requires_grad
        if name in names:
            assert value.dtype == torch.float32
            want = exact.state_dict()[name]
            assert ((value - want).abs() <= 6 * eps * want.abs()).all(), name
            assert not torch.equal(value, model.state_dict()[name].float())
        else:
            assert value.data_ptr() == model.state_dict()[name].data_ptr()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    Model().load_state_dict(full)


def test_full_precision_with_several_optimizers_and_with_the_wrong_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(BF16)
    model(torch.ones(2, 3, dtype=BF16)).sum().backward()
    optimizers = [onepass.SGD(part.parameters(), lr=0.1, weights="master") for part in model]
    for optimizer in optimizers:
        optimizer.step()
    full = onepass.full_precision_state_dict(model, *optimizers)
    assert {value.dtype for value in full.values()} == {torch.float32}
    half = onepass.full_precision_state_dict(model, optimizers[0])
    assert [value.dtype for value in half.values()] == [torch.float32] * 2 + [BF16] * 2
    other = onepass.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="optimizer 1 has no parameter of this model"):
        onepass.full_precision_state_dict(model, optimizers[0], other)
    with pytest.raises(ValueError, match="needs the optimizer"):
        onepass.full_precision_state_dict(model)


@pytest.mark.parametrize("weights", [name for name in WEIGHT_FORMATS if name != "native"])
@pytest.mark.parametrize("change", ["zero", "loaded", "negated"])
def test_weight_changed_by_the_user_is_used(weights, change):
    """After a change of the weight by the user, a stale companion moves the new weight by at most
    half of its bf16 spacing."""
    found = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        model = nn.Linear(40, 40).to(BF16)
        options = {"lr": 1e-3, "weights": weights, "backend": backend}
        optimizer = onepass.SGD(model.parameters(), **options)
        params = list(model.parameters())
        train(optimizer, params, 3)
        old = [p.detach().float() for p in params]
        new = nn.Linear(40, 40).to(BF16).state_dict()
        if change == "zero":
            new = {name: torch.zeros_like(value) for name, value in new.items()}
        if change == "negated":
            new = {name: -value for name, value in model.state_dict().items()}
        model.load_state_dict(new)
        full = onepass.full_precision_state_dict(model, optimizer)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p, before in zip(new, params, old, strict=True):
            want = new[name].float()
            # Half of the bf16 spacing; the Kahan compensation has the size of the old weight.
            size = torch.maximum(want.abs(), before.abs()) if weights == "kahan" else want.abs()
            limit = 2**-8 * size + 1e-38
            assert ((full[name].float() - want).abs() <= limit).all()
            assert ((p.detach().float() - want).abs() <= 2 * limit).all()
        found.append(optimizer)
    for other in found[1:]:
        assert_same(found[0], other)


# --- state bytes, and the names of bitsandbytes ---


@pytest.mark.parametrize("states", STATE_FORMATS)
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_state_bytes_match_the_formats(states, weights):
    count = 1 << 16
    (param,) = make_params([(count,)], BF16, 1)
    optimizer = onepass.AdamW([param], states=states, weights=weights)
    train(optimizer, [param], 2)
    held = [v.untyped_storage() for k, v in optimizer.state[param].items() if k != "step"]
    measured = sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())
    form, weight = STATE_FORMATS[states], WEIGHT_FORMATS[weights]
    assert measured == count * (2 * form.bytes + weight.bytes(BF16))


NAMED = {
    "Adam8bit": "mx8",
    "AdamW8bit": "mx8",
    "AdamW4bit": "mx4",
    "Lion8bit": "mx8",
    "SGD8bit": "mx8",
    "Adagrad8bit": "mx8",
    "RMSprop8bit": "mx8",
}


@pytest.mark.parametrize("name", NAMED)
def test_8bit_names_are_their_class_with_another_format(name):
    cls, base = getattr(onepass, name), getattr(onepass, name[:-4])
    ours, theirs = (dict(inspect.signature(kind).parameters) for kind in (cls, base))
    assert ours.pop("states").default == NAMED[name]
    assert theirs.pop("states").default == "fp32"
    assert ours == theirs
    assert f'``states="{NAMED[name]}"``' in cls.__doc__
    options = {"momentum": 0.9} if name == "SGD8bit" else {}
    runs = []
    for make, states in [(cls, {}), (base, {"states": NAMED[name]})]:
        params = make_params([(70,)], BF16, 1)
        optimizer = make(params, 0.01, **options, **states)
        train(optimizer, params, 3)
        runs.append((params[0].detach(), optimizer.param_groups[0]["states"]))
    assert same_bits(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] == NAMED[name]
    params = make_params([(70,)], BF16, 1)
    assert cls(params, states="bf16").param_groups[0]["states"] == "bf16"
    with pytest.raises(TypeError, match="optim_bits"):
        cls(params, optim_bits=8)


def test_sgd8bit_without_momentum_is_sgd():
    (param,) = params = make_params([(70,)], torch.float32, 1)
    optimizer = onepass.SGD8bit(params)
    train(optimizer, params, 1)
    assert set(optimizer.state[param]) == {"step"}
