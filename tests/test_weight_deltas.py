"""Patches of changed weights: what they contain, how they are applied, merged, stored, refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import onepass
from onepass.weight_sync.files import _safetensors
from onepass.weight_sync.taking import take_delta

from .support.thorough import THOROUGH


class Tied(nn.Module):
    """A model with tied, frozen, scalar, empty, transposed and tiny parameters, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 33)
        self.body = nn.Linear(33, 33)
        self.head = nn.Linear(33, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.scale, self.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0, 3))
        self.turned = nn.Parameter(torch.randn(20, 30).t())
        self.tiny = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(40))
        self.register_buffer("count", torch.zeros(()))


def make_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return Tied().to(dtype)


def make(dtype=torch.bfloat16, kind=onepass.AdamW, **options):
    """A model, its optimizer, and the state dict of a server with the same weights."""
    model = make_model(dtype)
    options = {"lr": 1e-4, "weights": "stochastic", **options}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trained, track_changes=True, **options)
    return model, optimizer, server_of(model)


def server_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def same(model, server):
    """Whether a server has the weights of a model, byte for byte."""
    server = server.state_dict() if isinstance(server, nn.Module) else server
    return all(
        torch.equal(p.detach().contiguous().view(-1).view(torch.uint8),
                    server[name].contiguous().view(-1).view(torch.uint8))
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.numel()
    )  # fmt: skip


RECIPES = [
    {"states": "mx8"},
    {"weights": "split8", "states": "mx4"},
    {"kind": onepass.Lion, "weights": "native"},
    {"kind": onepass.PagedAdamW8bit, "weights": "kahan"},
    {"dtype": torch.float32, "weights": "native", "ema_decay": 0.9},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_base_and_patches_are_the_weights(recipe):
    model, optimizer, server = make(**recipe)
    second, waiting = make_model(recipe.get("dtype", torch.bfloat16)), None
    for number in range(50 if THOROUGH else 12):
        step(model, optimizer, number)
        if number % 3 == 2:
            continue  # the next patch has the changes of two steps
        delta = onepass.take_delta(model, optimizer)
        assert onepass.apply_delta(server, delta) == delta.id
        assert same(model, server)
        # The second server gets two patches at a time.
        waiting = delta if waiting is None else onepass.merge_deltas(waiting, delta)
        if number % 2:
            onepass.apply_delta(second, waiting)
            assert same(model, second)
            waiting = None
    assert take_delta(model, optimizer).numel == 0 or number % 3 == 2


def test_patch_has_the_positions_of_the_changes():
    model, optimizer, _ = make()
    before = server_of(model)
    step(model, optimizer, 0)
    delta = onepass.take_delta(model, optimizer)
    assert delta.tied == {"head.weight": "embedding.weight"}
    assert set(delta.changes) == {name for name, _ in model.named_parameters()}
    for name, change in delta.changes.items():
        new, old = model.get_parameter(name).detach().reshape(-1), before[name].reshape(-1)
        changed = (new.view(torch.int16) != old.view(torch.int16)).nonzero().flatten()
        if change.positions is None:
            assert torch.equal(change.values, new)  # smaller than with positions
            assert len(changed) * 6 >= new.nbytes
        else:
            assert torch.equal(change.positions.long(), changed)
            assert torch.equal(change.values, new[changed])
    assert len(delta.changes["frozen"].values) == 0
    assert delta.changes["turned"].positions is not None
    assert 0 < delta.nbytes < 0.5 * sum(p.nbytes for p in model.parameters())
    assert repr(delta).startswith(f"Delta({delta.id} after the start: {delta.numel} of ")


OUTSIDE = {
    "in place": lambda p: p.add_(1),
    "assigned": lambda p: setattr(p, "data", p.data + 1),
    "through data, marked": lambda p: (p.data.add_(1), onepass.mark_changed(p)),
    "through NumPy, marked": lambda p: (
        p.view(torch.int16).numpy().__iadd__(1), onepass.mark_changed(p),
    ),
    "foreach": lambda p: torch._foreach_add_([p], 1.0),
}  # fmt: skip


@pytest.mark.parametrize("write", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("name", ["body.weight", "frozen", "turned"])
def test_writes_from_outside_are_in_the_patch(write, name):
    model, optimizer, server = make()
    step(model, optimizer, 0)
    onepass.apply_delta(server, onepass.take_delta(model, optimizer))
    with torch.no_grad():
        param = model.get_parameter(name)
        if param.is_contiguous() or "NumPy" not in str(write):
            write(param)
    step(model, optimizer, 1)
    delta = onepass.take_delta(model, optimizer)
    assert delta.changes[name].positions is None
    assert delta.changes["embedding.weight"].positions is not None
    onepass.apply_delta(server, delta)
    assert same(model, server)
    # Afterwards the parameter is recorded weight by weight again.
    assert onepass.take_delta(model, optimizer).numel == 0


def test_loaded_and_averaged_weights_are_in_the_patch():
    model, optimizer, server = make(ema_decay=0.5)
    step(model, optimizer, 0)
    onepass.apply_delta(server, onepass.take_delta(model, optimizer))
    model.load_state_dict(make_model().state_dict())
    delta = onepass.take_delta(model, optimizer)
    assert delta.complete
    onepass.apply_delta(server, delta)
    with optimizer.averaged_weights(), pytest.raises(RuntimeError, match="leave averaged_weights"):
        onepass.take_delta(model, optimizer)
    delta = onepass.take_delta(model, optimizer)
    assert delta.changes["body.weight"].complete
    onepass.apply_delta(server, delta)
    assert same(model, server)
    # The record of changes is not saved: after loading, every weight counts as changed.
    optimizer.load_state_dict(optimizer.state_dict())
    assert not [key for group in optimizer.state_dict()["state"].values() for key in group
                if "chang" in key]  # fmt: skip
    assert onepass.take_delta(model, optimizer).complete
    step(model, optimizer, 1)
    assert not onepass.take_delta(model, optimizer).complete


def test_weights_of_schedule_free_evaluation():
    model, optimizer, server = make(kind=onepass.AdamWScheduleFree)
    for number in range(3):
        step(model, optimizer, number)
        optimizer.eval()
        onepass.apply_delta(server, onepass.take_delta(model, optimizer))
        assert same(model, server)
        optimizer.train()


def test_a_resumed_trainer_sends_every_weight():
    model, optimizer, server = make()
    step(model, optimizer, 0)
    onepass.apply_delta(server, onepass.take_delta(model, optimizer))
    step(model, optimizer, 1)
    resumed, other, _ = make()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    step(resumed, other, 2)
    delta = onepass.take_delta(resumed, other)
    assert delta.complete
    assert not delta.checksums
    onepass.apply_delta(server, delta)
    assert same(resumed, server)


def test_new_parameters_and_groups():
    model, optimizer, server = make()
    step(model, optimizer, 0)
    onepass.apply_delta(server, onepass.take_delta(model, optimizer))
    # A parameter that was frozen is trained from now on.
    model.frozen.requires_grad_()
    optimizer.add_param_group({"params": [model.frozen]})
    step(model, optimizer, 1)
    onepass.apply_delta(server, onepass.take_delta(model, optimizer))
    assert same(model, server)
    model.added = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [model.added]})
    step(model, optimizer, 2)
    delta = onepass.take_delta(model, optimizer)
    with pytest.raises(ValueError, match="no tensor added"):
        onepass.apply_delta(server, delta)
    server["added"] = torch.zeros(5, dtype=torch.bfloat16)
    onepass.apply_delta(server, delta)
    assert same(model, server)


def test_another_dtype_is_refused_by_the_server():
    model, optimizer, server = make(weights="native")
    step(model, optimizer, 0)
    onepass.apply_delta(server, onepass.take_delta(model, optimizer))
    model.to(torch.float32)
    step(model, optimizer, 1)
    delta = onepass.take_delta(model, optimizer)
    assert delta.changes["body.weight"].complete
    with pytest.raises(ValueError, match=r"is torch.bfloat16 in the target and torch.float32"):
        onepass.apply_delta(server, delta)


def test_a_patch_that_does_not_follow_is_refused():
    model, optimizer, server = make()
    start = copy.deepcopy(server)
    deltas = []
    for number in range(3):
        step(model, optimizer, number)
        deltas.append(onepass.take_delta(model, optimizer))
    first, second, third = deltas
    with pytest.raises(ValueError, match="no patch was applied to these weights"):
        onepass.apply_delta(server, second)
    server["body.bias"][3] += 1
    with pytest.raises(ValueError, match=r"body\.bias differs from the trainer's weights at the"):
        onepass.apply_delta(server, first)
    server["body.bias"].copy_(start["body.bias"])
    onepass.apply_delta(server, first)
    for wrong in (first, third):
        kept = copy.deepcopy(server)
        with pytest.raises(ValueError, match=r"patch|differs"):
            onepass.apply_delta(server, wrong)
        assert all(map(torch.equal, server.values(), kept.values()))
    # Another dictionary of the same weights is not known, but the caller may know it.
    other = {name: value.clone() for name, value in server.items()}
    with pytest.raises(ValueError, match="no patch was applied"):
        onepass.apply_delta(other, second)
    onepass.apply_delta(other, second, after=first.id)
    onepass.apply_delta(other, third)
    assert same(model, other)
    server["turned"].mul_(2)
    with pytest.raises(RuntimeError, match="turned was written after patch"):
        onepass.apply_delta(server, second)
    onepass.apply_delta(server, onepass.take_delta(model, optimizer, complete=True))
    assert same(model, server)


def test_targets_that_do_not_fit_are_refused():
    model, optimizer, server = make()
    step(model, optimizer, 0)
    delta = onepass.take_delta(model, optimizer)
    for change, message in (
        ({"body.bias": torch.zeros(34, dtype=torch.bfloat16)}, r"shape \(34,\) in the target"),
        ({"body.bias": torch.zeros(33)}, "is torch.float32 in the target"),
        ({"body.bias": torch.zeros(33, device="meta")}, "whole tensor with memory"),
    ):
        with pytest.raises(ValueError, match=message):
            onepass.apply_delta({**server, **change}, delta)
    with pytest.raises(TypeError, match=r"torch.nn.Module or a state dict"):
        onepass.apply_delta([server], delta)
    onepass.apply_delta(server, delta)
    with torch.inference_mode():
        frozen = {name: value.clone() for name, value in make_model().state_dict().items()}
    onepass.apply_delta(frozen, delta)
    assert same(model, frozen)


def test_models_that_cannot_be_tracked_are_refused():
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match="track_changes=True"):
        onepass.take_delta(model, onepass.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="must have a parameter of the optimizer"):
        onepass.take_delta(nn.Linear(2, 2), optimizer)
    model.alias = nn.Parameter(model.body.bias.detach())
    with pytest.raises(ValueError, match="share memory"):
        onepass.take_delta(model, optimizer)
    del model.alias
    step(model, optimizer, 0)
    onepass.take_delta(model, optimizer)
    del model.frozen
    with pytest.raises(ValueError, match="no parameter frozen"):
        onepass.take_delta(model, optimizer)
    with torch.inference_mode():
        inference = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(ValueError, match="no version counter"):
        onepass.mark_changed(inference)


def test_an_error_while_taking_loses_no_change(monkeypatch):
    model, optimizer, server = make()
    step(model, optimizer, 0)

    def failing(records, params, wide):
        for record in records:
            record.zero_()
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("onepass.weight_sync.taking.take_changes", failing)
        with pytest.raises(MemoryError):
            onepass.take_delta(model, optimizer)
    onepass.apply_delta(server, onepass.take_delta(model, optimizer))
    assert same(model, server)


def test_compiled_steps_and_wrapped_models():
    torch.manual_seed(0)
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    server = server_of(model)
    optimizer = onepass.Lion(model.parameters(), lr=1e-4, track_changes=True)
    compiled = torch.compile(model, backend="eager")
    run = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        run()
        delta = onepass.take_delta(compiled, optimizer)
        assert not delta.complete
        onepass.apply_delta(server, delta)
        assert same(model, server)


# --- merging and files ---


def test_patches_that_cannot_be_merged():
    model, optimizer, _ = make()
    deltas = []
    for number in range(3):
        step(model, optimizer, number)
        deltas.append(onepass.take_delta(model, optimizer))
    with pytest.raises(ValueError, match="b must follow a"):
        onepass.merge_deltas(deltas[0], deltas[2])
    with pytest.raises(ValueError, match="b must follow a"):
        onepass.merge_deltas(deltas[1], deltas[0])
    with pytest.raises(ValueError, match="of different ranks"):
        onepass.merge_deltas(deltas[1], deltas[1])


@pytest.fixture
def needs_safetensors():
    pytest.importorskip("safetensors")


@pytest.mark.usefixtures("needs_safetensors")
def test_files_keep_every_byte(tmp_path):
    model, optimizer, server = make()
    for number in range(2):
        step(model, optimizer, number)
        if number:
            onepass.mark_changed(model.body.weight)
        delta = onepass.take_delta(model, optimizer)
        onepass.save_delta(delta, tmp_path / "delta")
        assert [path.name for path in tmp_path.iterdir()] == ["delta"]
        found = onepass.load_delta(tmp_path / "delta")
        for name in ("id", "predecessor", "checksums", "tied", "parts", "ranks"):
            assert getattr(found, name) == getattr(delta, name)
        assert list(found.changes) == list(delta.changes)
        onepass.apply_delta(server, found)
        assert same(model, server)


@pytest.mark.usefixtures("needs_safetensors")
def test_damaged_files_are_refused(tmp_path):
    model, optimizer, _ = make()
    step(model, optimizer, 0)
    onepass.save_delta(onepass.take_delta(model, optimizer), tmp_path / "delta")
    save, path = _safetensors().torch.save_file, tmp_path / "other"
    with _safetensors().safe_open(str(tmp_path / "delta"), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    at = "embedding.weight.positions"
    for change in (
        {at: tensors[at].flip(0)},
        {at: tensors[at][:-1]},
        {at: tensors[at].float()},
        {at: torch.cat([tensors[at][:-1], torch.tensor([50 * 33], dtype=torch.int32)])},
        {"body.bias.values": torch.zeros(50, dtype=torch.bfloat16)},
    ):
        save({**tensors, **change}, str(path), metadata=metadata)
        with pytest.raises(ValueError, match=r"delta of (embedding.weight|body.bias): "):
            onepass.load_delta(path)
    save({key: value for key, value in tensors.items() if key != "turned.values"}, str(path),
         metadata=metadata)  # fmt: skip
    with pytest.raises(ValueError, match="is not a delta"):
        onepass.load_delta(path)
    save(tensors, str(path))
    with pytest.raises(ValueError, match="is not a delta of this version"):
        onepass.load_delta(path)
    path.write_bytes((tmp_path / "delta").read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a delta"):
        onepass.load_delta(path)


def test_files_need_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        onepass.load_delta(tmp_path / "delta")
