"""Gradients that a step accepts, and errors that name the ones that it refuses.

A step accepts every readable dense tensor that torch allows as a gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only

import onepass

from .cases import assert_same, same_bits
from .support.thorough import THOROUGH
from .test_plan import BACKENDS

needs_library = pytest.mark.skipif(bool(onepass.ops.missing), reason=onepass.ops.missing or "-")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Plain(torch.Tensor):
    """A subclass that overrides nothing."""


class Doubled(torch.Tensor):
    """A subclass whose __torch_function__ makes its values twice those in memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            args = tree_map_only(cls, lambda t: t.as_subclass(torch.Tensor) * 2, args)
            return func(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    """A subclass without memory that forwards operations to another tensor."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = tree_map_only(Wrapper, lambda t: t.inner, args)
        return func(*args, **(kwargs or {}))


class Closed(Wrapper):
    """A wrapper whose values cannot be read."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError("closed")


def expanded(value):
    return value[:, :1].expand(value.shape)


# name -> functions of a value: the gradient, and the plain tensor with the gradient's values.
READABLE = {
    "subclass": (lambda v: v.as_subclass(Plain), lambda v: v),
    "parameter": (torch.nn.Parameter, lambda v: v),
    "function": (lambda v: v.as_subclass(Doubled), lambda v: 2 * v),
    "wrapper": (Wrapper, lambda v: v),
    "two tensors": (lambda v: TwoTensor(v, v.clone()), lambda v: v),
    "negated": (torch._neg_view, lambda v: -v),
    "imaginary part": (lambda v: torch.complex(v, v).conj().imag, lambda v: -v),
    "expanded": (expanded, lambda v: expanded(v).contiguous()),
    "transposed": (lambda v: v.t().contiguous().t(), lambda v: v),
    "strided": (lambda v: v.repeat_interleave(2, dim=1)[:, ::2], lambda v: v),
    "at an offset": (lambda v: torch.cat([v, v])[4:], lambda v: v),
    "bfloat16": (torch.Tensor.bfloat16, torch.Tensor.bfloat16),
    "not a leaf": (lambda v: v.clone().requires_grad_() * 1.0, lambda v: v),
}


ZEROED = [*READABLE.values()][::2]


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize(("make", "meant"), READABLE.values(), ids=READABLE)
def test_gradients_count_with_the_values_that_they_stand_for(backend, make, meant, zero_grads):
    """Tests an odd gradient in the first, third and fourth step, and a plain one in the second."""
    if backend == "triton" and zero_grads != ((make, meant) in ZEROED) and not THOROUGH:
        pytest.skip("the interpreter zeroes every second kind; make test-all zeroes all")
    made = []
    for own in (make, meant):
        params = [torch.nn.Parameter(randn(4, 4)) for _ in range(3)]
        optimizer = onepass.AdamW(params, lr=0.1, backend=backend, zero_grads=zero_grads)
        for step in range(4):
            for param in params:
                param.grad = randn(4, 4)
            if step != 1:
                params[1].grad = None
                params[1].grad_dtype = None
                params[1].grad = own(randn(4, 4) + step).detach()
            optimizer.step()
            if zero_grads:
                assert not any(torch.zeros(4, 4).copy_(p.grad).any() for p in params)
        made.append(optimizer)
    assert_same(*made)


def freed(grad):
    grad.untyped_storage().resize_(0)
    return grad


def shrunk(grad):
    grad.untyped_storage().resize_(32)
    return grad


def freed_behind(grad):
    part = torch.cat([grad, grad])[4:]
    part.untyped_storage().resize_(0)
    return part


REFUSED = {
    "freed": (freed, "its gradient has no memory"),
    "shrunk": (shrunk, "its gradient has no memory"),
    "freed at an offset": (freed_behind, "its gradient has no memory"),
    "zero tensor": (lambda v: torch._efficientzerotensor(4, 4), "its gradient has no memory"),
    "closed wrapper": (Closed, r"its gradient is a Closed, which cannot be copied.*closed"),
    "sparse": (torch.Tensor.to_sparse, "has one with layout torch.sparse_coo"),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_gradient_that_cannot_be_read_is_refused_by_name(backend, make, message, first):
    params = [torch.nn.Parameter(randn(4, 4)) for _ in range(3)]
    optimizer = onepass.AdamW(params, lr=0.1, backend=backend)
    for param in params:
        param.grad = randn(4, 4)
    if not first:
        optimizer.step()
    before = [param.detach().clone() for param in params]
    good, params[1].grad = params[1].grad, make(randn(4, 4))
    with pytest.raises((ValueError, RuntimeError), match=rf"parameter 1 of shape.*{message}"):
        optimizer.step()
    assert all(map(same_bits, params, before))
    assert len(optimizer.state) == (0 if first else 3)
    params[1].grad = good
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == (1 if first else 2)


@pytest.mark.parametrize("shape", [(0,), (), (1,)], ids=str)
def test_a_later_sparse_gradient_of_any_size_is_refused(backend, shape):
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(shape))]
    optimizer = onepass.AdamW(params, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = params[0].detach().clone()
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradients: parameter 1"):
        optimizer.step()
    assert same_bits(params[0], before)
    params[1].grad = torch.ones(shape)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


def test_gradients_of_a_function_transform_are_refused(backend):
    param = torch.nn.Parameter(randn(3))
    optimizer = onepass.SGD([param], lr=0.1, backend=backend)
    kept = []

    def keep(x):
        kept.append(x)
        return x.sum()

    torch.vmap(keep)(randn(2, 3))
    param.grad = kept[0]
    with pytest.raises(ValueError, match=r"parameter 0 of shape.*its gradient has no memory"):
        optimizer.step()
    param.grad = randn(3)
    optimizer.step()
    param.grad = kept[0]
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()


def test_memory_of_parameters_and_states_that_was_freed_is_noticed(backend):
    for free in (
        lambda p, state: p.untyped_storage().resize_(0),
        lambda p, state: state["exp_avg"].untyped_storage().resize_(0),
        lambda p, state: state["exp_avg"].untyped_storage().resize_(64),
    ):
        params = [torch.nn.Parameter(torch.ones(20_000)) for _ in range(2)]
        optimizer = onepass.AdamW(params, backend=backend)
        for param in params:
            param.grad = torch.ones(20_000)
        optimizer.step()
        free(params[1], optimizer.state[params[1]])
        with pytest.raises(ValueError, match=r"parameter 1 of shape.*has no memory"):
            optimizer.step()
        assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("size", [4, 0])
@pytest.mark.parametrize("which", [0, 1])
def test_a_parameter_that_went_to_the_meta_device_is_refused(backend, which, size):
    params = [torch.nn.Parameter(randn(n)) for n in ((size, 4) if which == 0 else (4, size))]
    optimizer = onepass.AdamW(params, lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    other = torch.nn.Parameter(torch.empty(size, device="meta"))
    other.grad = torch.empty(size, device="meta")
    torch.utils.swap_tensors(params[which], other)
    with pytest.raises(ValueError, match=f"parameter {which} of shape"):
        optimizer.step()
    torch.utils.swap_tensors(params[which], other)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 2]


def test_a_parameter_that_is_a_wrapper_is_refused(backend):
    param = torch.nn.Parameter(TwoTensor(randn(3), randn(3)))
    param.grad = TwoTensor(randn(3), randn(3))
    with pytest.raises(ValueError, match=r"parameter 0 of shape.* is a TwoTensor"):
        onepass.SGD([param], backend=backend).step()


def test_pending_collectives_and_dtensors(backend, tmp_path):
    """A step waits for a pending collective; a DTensor and a plain tensor must not be mixed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        over = init_device_mesh("cpu", (1,))
        params = [
            torch.nn.Parameter(torch.zeros(40)),
            torch.nn.Parameter(distribute_tensor(torch.zeros(40), over, [Shard(0)])),
        ]
        optimizer = onepass.SGD(params, lr=1.0, backend=backend, zero_grads=True)
        for step in range(3):
            pending = [
                collectives.all_reduce(torch.full((40,), 2.0), "sum", dist.group.WORLD)
                for _ in params
            ]
            if step == 1:
                pending = [torch.full((40,), 2.0) for _ in params]
            params[0].grad = pending[0]
            params[1].grad = DTensor.from_local(pending[1], over, [Shard(0)])
            optimizer.step()
            assert (params[0] == -2.0 * (step + 1)).all()
            assert (params[1].to_local() == -2.0 * (step + 1)).all()
            assert not pending[0].any()
        for i, grad in (
            (0, distribute_tensor(torch.ones(40), over, [Shard(0)])),
            (1, torch.ones(40)),
        ):
            kept = params[i].grad
            params[i].grad = None
            params[i].grad = grad
            with pytest.raises(ValueError, match=rf"parameter {i} of shape.*DTensor, but its grad"):
                optimizer.step()
            params[i].grad = kept
    finally:
        dist.destroy_process_group()


# --- gradients and parameters that share memory ---


@pytest.mark.parametrize("zero_grads", [False, True])
def test_gradients_that_share_memory_all_count(backend, zero_grads):
    buffer = randn(48)
    shared = {
        "one tensor": lambda: [buffer[:40]] * 2,
        "views that overlap": lambda: [buffer[:40], buffer[8:]],
        "apart": lambda: [buffer[:40], randn(40)],
    }
    for make in shared.values():
        buffer.copy_(randn(48))
        params = [torch.nn.Parameter(torch.zeros(40)) for _ in range(2)]
        optimizer = onepass.SGD(params, lr=1.0, backend=backend, zero_grads=zero_grads)
        for _ in range(2):
            buffer.copy_(randn(48))
            grads = make()
            expected = [p.detach() - g for p, g in zip(params, grads, strict=True)]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
            assert all(map(same_bits, params, expected))
            assert zero_grads != any(grad.any() for grad in grads)


def test_parameters_that_share_memory_are_refused(backend):
    value = torch.zeros(8)
    one = torch.nn.Parameter(torch.zeros(8))
    for params in ([torch.nn.Parameter(value), torch.nn.Parameter(value[4:])], [one, one]):
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.warns() if params[0] is params[1] else pytest.MonkeyPatch.context():
            optimizer = onepass.SGD(params, backend=backend)
        with pytest.raises(ValueError, match="parameter 0 and parameter 1 share memory"):
            optimizer.step()
