"""DevicePlan.refresh detects changed tensors when it reads the gradients of a later step."""

from __future__ import annotations

import sys

import pytest
import torch

import onepass
from onepass.engine.backends import NO_SWITCHES, StepArgs

from .cases import same_bits
from .test_gradients import needs_library, randn


def planned():
    """An optimizer after one step, its parameters, and the device plan of its plan."""
    params = [torch.nn.Parameter(randn(3, 3)) for _ in range(4)]
    for param in params:
        param.grad = randn(3, 3)
    optimizer = onepass.AdamW(params, backend="cpu")
    optimizer.step()
    return optimizer, params, optimizer._plan._parts[0]


def move(tensor):
    tensor.data = tensor.data.clone()


CHANGES = {
    "no gradient": lambda p, s: setattr(p, "grad", None),
    "sparse": lambda p, s: setattr(p, "grad", torch.eye(3).to_sparse()),
    "a dtype without a format": lambda p, s: setattr(p.grad, "data", torch.ones(3, 3).double()),
    "other strides": lambda p, s: setattr(p, "grad", torch.randn(3, 3).t()),
    "other shape": lambda p, s: setattr(p.grad, "data", torch.ones(9)),
    "negated": lambda p, s: setattr(p, "grad", torch._neg_view(torch.ones(3, 3))),
    "parameter moved": lambda p, s: move(p),
    "parameter turned": lambda p, s: setattr(p, "data", p.data.t()),
    "state moved": lambda p, s: move(s["exp_avg"]),
}


@needs_library
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_refresh_detects_changes(change):
    optimizer, params, part = planned()
    assert part.refresh()
    change(params[2], optimizer.state[params[2]])
    assert not part.refresh()
    part.stage(None)
    with pytest.raises(RuntimeError, match="run without refresh"):
        part.run(None, NO_SWITCHES)


@needs_library
def test_a_parameter_of_another_dtype_in_the_same_place_is_noticed():
    param = torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
    param.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer = onepass.AdamW([param], backend="cpu")
    optimizer.step()
    part = optimizer._plan._parts[0]
    assert part.refresh()
    param.data = param.data.view(torch.float16)
    assert not part.refresh()


@needs_library
def test_new_gradients_are_read_in_place():
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


@needs_library
def test_no_reference_to_a_gradient_is_kept():
    optimizer, params, _ = planned()
    counts = [sys.getrefcount(param.grad) for param in params]
    optimizer.max_grad_norm = 1.0
    for _ in range(3):
        optimizer.step()
        optimizer.measure()
    assert [sys.getrefcount(param.grad) for param in params] == counts


@needs_library
def test_a_parameter_appended_to_a_group_is_stepped():
    optimizer, params, _ = planned()
    new = torch.nn.Parameter(torch.ones(3))
    new.grad = torch.ones(3)
    optimizer.param_groups[0]["params"].append(new)
    optimizer.step()
    assert len(optimizer.state) == len(params) + 1
    assert new[0] != 1


@needs_library
def test_run_is_refused_after_a_refresh_with_too_few_gradients():
    _, params, part = planned()
    grads = [param.grad for param in params]
    assert part.backend.refresh(part.prepared, params, grads)
    assert not part.backend.refresh(part.prepared, params, grads[:-1])
    with pytest.raises(RuntimeError, match="run without refresh"):
        part.backend.run(part.prepared, StepArgs(part.table.hyper, part.table.counters))
