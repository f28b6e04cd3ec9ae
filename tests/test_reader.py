"""Gradients read in C from Python's objects: what is taken, what is noticed, and doing without."""

from __future__ import annotations

import sys

import pytest
import torch

import onepass
from onepass import reader

from .cases import same_bits

pytestmark = pytest.mark.skipif(bool(onepass.ops.missing), reason=onepass.ops.missing or "-")


def planned():
    """An optimizer that has stepped, its parameters, and the part of its plan."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 3, generator=generator)) for _ in range(4)]
    for param in params:
        param.grad = torch.randn(3, 3, generator=generator)
    optimizer = onepass.AdamW(params, backend="cpu")
    optimizer.step()
    return optimizer, params, optimizer._plan._parts[0]


def move(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


CHANGES = {
    "no gradient": lambda p, s: setattr(p, "grad", None),
    "sparse": lambda p, s: setattr(p, "grad", torch.eye(3).to_sparse()),
    "a dtype without a format": lambda p, s: setattr(p.grad, "data", torch.ones(3, 3).double()),
    "other strides": lambda p, s: setattr(p, "grad", torch.randn(3, 3).t()),
    "other shape": lambda p, s: setattr(p.grad, "data", torch.ones(9)),
    "parameter moved": lambda p, s: move(p),
    "parameter turned": lambda p, s: setattr(p, "data", p.data.t()),
    "state moved": lambda p, s: move(s["exp_avg"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_has_changed_is_noticed(change):
    optimizer, params, part = planned()
    assert part.backend.read(part.prepared, params)
    change(params[2], optimizer.state[params[2]])
    assert not part.backend.read(part.prepared, params)
    with pytest.raises(RuntimeError, match="run without refresh"):
        part.backend.run(part.prepared, part.table.hyper, part.table.counters)


def test_a_parameter_of_another_dtype_in_the_same_place_is_noticed():
    param = torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
    param.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer = onepass.AdamW([param], backend="cpu")
    optimizer.step()
    part = optimizer._plan._parts[0]
    assert part.backend.read(part.prepared, [param])
    param.data = param.data.view(torch.float16)
    assert not part.backend.read(part.prepared, [param])


def test_new_gradients_are_taken_where_they_are():
    optimizer, params, _ = planned()
    plan = optimizer._plan
    other, twins, _ = planned()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for param, twin in zip(params, twins, strict=True):
            param.grad, twin.grad = None, None
            param.grad = torch.full((3, 3), 0.25)
            param.grad.data = param.grad.data.to(dtype)
            twin.grad = torch.full((3, 3), 0.25)
        optimizer.step()
        other.step()
        assert optimizer._plan is plan
        assert all(map(same_bits, params, twins))


def test_no_reference_is_kept():
    optimizer, params, _ = planned()
    counts = [sys.getrefcount(param.grad) for param in params]
    for _ in range(3):
        optimizer.step()
    assert [sys.getrefcount(param.grad) for param in params] == counts


def test_a_torch_without_the_exchange_api_is_served_by_the_list(monkeypatch):
    optimizer, params, _ = planned()
    monkeypatch.setattr(reader, "_python", lambda: None)
    other, twins, part = planned()
    assert not part.backend.read(part.prepared, twins)
    plan = other._plan
    for _ in range(3):
        optimizer.step()
        other.step()
    assert other._plan is plan
    assert all(map(same_bits, params, twins))


def test_the_exchange_api_of_this_torch_is_found():
    has = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert (reader._python() is not None) == has


@pytest.mark.parametrize("fallback", [False, True])
def test_same_lists(monkeypatch, fallback):
    if fallback:
        monkeypatch.setattr(reader, "_python", lambda: None)
    a, b = torch.ones(1), torch.ones(1)
    assert reader.same_lists([a, b], [a, b])
    assert reader.same_lists([], [])
    assert reader.same_lists((a, b), [a, b])
    assert not reader.same_lists([a, a], [a, b])  # equal, but not the same
    assert not reader.same_lists([a, b], [a])
    assert not reader.same_lists([a], [a, b])


def test_a_parameter_appended_to_a_group_is_stepped():
    optimizer, params, _ = planned()
    new = torch.nn.Parameter(torch.ones(3))
    new.grad = torch.ones(3)
    optimizer.param_groups[0]["params"].append(new)
    optimizer.step()
    assert len(optimizer.state) == len(params) + 1
    assert new[0] != 1


def test_too_few_gradients_leave_nothing_to_run():
    _, params, part = planned()
    grads = [param.grad for param in params]
    assert part.backend.refresh(part.prepared, grads)
    assert not part.backend.refresh(part.prepared, grads[:-1])
    with pytest.raises(RuntimeError, match="run without refresh"):
        part.backend.run(part.prepared, part.table.hyper, part.table.counters)


def test_gradients_that_are_negated_as_they_are_read():
    """As imaginary parts of conjugates are: what lies in memory has the other sign."""
    value = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer, reference = onepass.SGD([ours], lr=0.1, backend="cpu"), onepass.SGD([theirs], lr=0.1)
    for _ in range(2):
        ours.grad = torch._neg_view(value)
        assert ours.grad.is_neg()
        theirs.grad = ours.grad.resolve_neg()
        optimizer.step()
        reference.step()
        assert same_bits(ours, theirs)
