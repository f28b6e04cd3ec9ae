"""Failing launches of the CUDA library: the step is not counted, and the next step is correct."""

from __future__ import annotations

import pytest
import torch

import onepass
from onepass.engine.backends import StepArgs

from . import cuda_shim
from .cases import advance, assert_same, make_params, same_bits
from .support.comparison import states_of
from .support.targets import STAND_IN, needs_stand_in

pytestmark = [needs_stand_in, pytest.mark.usefixtures("cuda_stand_in")]
INF, NAN = float("inf"), float("nan")


OUT_OF_RESOURCES, NO_CODE = 701, 209  # values of cudaError_t


@pytest.fixture
def _healthy():
    yield
    cuda_shim.set_devices()
    cuda_shim.fail("", 0)


def two_steps(backend, failing=None, dtypes=(torch.float32, torch.float32)):
    """An optimizer after two steps; calls failing(optimizer, number) before each step."""
    params = make_params([(33,), (2085,)], torch.float32, 1)
    optimizer = onepass.AdamW(params, lr=0.1, states="mx8", backend=backend, seed=3)
    for number, dtype in enumerate(dtypes):
        generator = torch.Generator().manual_seed(number)
        for param in params:
            grad = torch.randint(-9, 10, param.shape, generator=generator).to(dtype)
            param.grad_dtype = None
            param.grad = grad
        if failing:
            failing(optimizer, number)
        optimizer.step()
    return optimizer


def snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in params for t in (p.detach(), *states_of(optimizer, p))]
    return [t.clone() for t in tensors]


@pytest.mark.usefixtures("_healthy")
def test_a_launch_that_fails_names_the_error_and_the_next_step_works():
    def failing(optimizer, number):
        (part,) = optimizer.adopted()._parts
        table, before = part.table, snapshot(optimizer)
        counted = [t.clone() for t in (table.steps, table.fresh)]
        advance(part.backend, table, None)
        cuda_shim.fail("cudaLaunchKernelEx", OUT_OF_RESOURCES)
        with pytest.raises(RuntimeError, match=r"launching \d+ blocks: cudaErrorLaunchOutOfRes"):
            part.backend.run(part.prepared, StepArgs(table.hyper, table.counters))
        part.backend.retreat(table, counted[1])
        assert same_bits(table.steps, counted[0])
        assert same_bits(table.fresh, counted[1])
        assert all(map(same_bits, before, snapshot(optimizer)))
        # The failed launch has used up the gradients.
        with pytest.raises(RuntimeError, match="run without refresh"):
            part.backend.run(part.prepared, StepArgs(table.hyper, table.counters))

    assert_same(two_steps(STAND_IN, failing), two_steps("reference"))


@pytest.mark.usefixtures("_healthy")
@pytest.mark.parametrize("call", ["cudaLaunchKernelEx", "cudaStreamWaitEvent"])
def test_launches_of_a_norm_that_fail_name_the_error(call):
    def failing(optimizer, number):
        (part,) = optimizer.adopted()._parts
        for after in (0, 1) if call == "cudaLaunchKernelEx" else (0,):
            cuda_shim.select(0, 1)
            part.backend.norm(part.prepared)
            cuda_shim.fail(call, OUT_OF_RESOURCES, after)
            with pytest.raises(RuntimeError, match="cudaErrorLaunchOutOfResources"):
                part.backend.norm(part.prepared)
            cuda_shim.select()

    assert_same(two_steps(STAND_IN, failing), two_steps("reference"))


@pytest.mark.usefixtures("_healthy")
@pytest.mark.parametrize("number", [0, 1])
def test_a_kernel_that_does_not_load_is_found_before_the_step_is_counted(number):
    """The error is raised at refresh, when the dtypes of the gradients select the kernel."""

    def failing(optimizer, now):
        if now != number:
            return
        params = optimizer.param_groups[0]["params"]
        before = snapshot(optimizer) if number else [p.detach().clone() for p in params]
        cuda_shim.set_devices((90, NO_CODE))
        launches = cuda_shim.launches()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cudaErrorNoKernelImageForDevice"):
                optimizer.step()
        assert cuda_shim.launches() == launches
        cuda_shim.set_devices()
        after = snapshot(optimizer) if number else [p.detach() for p in params]
        assert all(map(same_bits, before, after))

    dtypes = (torch.float32, torch.bfloat16)
    assert_same(two_steps(STAND_IN, failing, dtypes), two_steps("reference", None, dtypes))
