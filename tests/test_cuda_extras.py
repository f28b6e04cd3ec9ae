"""Averages, telemetry and the record of changed weights in csrc/cuda, together, on the stand-in."""

from __future__ import annotations

import math

import pytest
import torch

import onepass
from onepass.paging.options import SMALLEST_PAGE, Paging

from . import cuda_shim
from .cases import assert_same, make_params, same_bits, set_grads
from .support.comparison import params_of
from .support.targets import STAND_IN, needs_stand_in

pytestmark = [needs_stand_in, pytest.mark.usefixtures("cuda_stand_in")]

OUT_OF_RESOURCES = 701  # value of cudaError_t
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EXTRAS = {"telemetry": True, "track_changes": True, "zero_grads": True, "skip_nonfinite": True}
SIZES = [(33,), (0,), (16384 + 300,), (), (3, 5)]
# A list with one combination runs a kernel for that combination, with weights that are put aside
# before the vote or found in the codes after it. The other lists mix formats, or flags as well.
LISTS = {
    "exact": [(FP32, {"ema_decay": 0.9})],
    "split": [(BF16, {"weights": "split16", "states": "bf16", "ema_decay": 0.5})],
    "rounded": [(BF16, {"weights": "split8", "states": "mx8", "ema_decay": 0.9})],
    "stochastic": [(BF16, {"weights": "stochastic", "states": "mx4", "ema_decay": 0.9})],
    "formats": [
        (BF16, {"weights": "kahan", "states": "mx4"}),
        (FP16, {"weights": "master", "states": "bf16", "ema_decay": 0.5}),
        (FP32, {"states": "dynamic8", "ema_decay": 0.75}),
    ],
    "flags": [
        (BF16, {"weights": "stochastic", "states": "mx8", "amsgrad": True, "ema_decay": 0.9}),
        (BF16, {"weights": "split16", "maximize": True}),
    ],
}


def made(backend, groups, offset=0, sizes=SIZES, **options):
    """AdamW over a list, each tensor of which starts `offset` elements into its storage."""
    found = []
    for number, (dtype, group) in enumerate(groups):
        params = []
        for param in make_params(sizes, dtype, seed=number):
            storage = torch.empty(param.numel() + offset, dtype=dtype)
            inside = storage[offset:].view(param.shape)
            params.append(torch.nn.Parameter(inside.copy_(param.detach())))
        found.append({"params": params, **group})
    return onepass.AdamW(found, lr=1e-3, backend=backend, **{**EXTRAS, **options})


def give_grads(optimizer, step, value=None):
    """Sets new gradients; the last weight of the third parameter gets a value."""
    for number, param in enumerate(params_of(optimizer)):
        generator = torch.Generator().manual_seed(100 * step + number)
        # No zeros, so that blocks of mx8 stay on the fast path.
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    if value is not None:
        params_of(optimizer)[2].grad.view(-1)[-1] = value


def assert_equal(ours, theirs):
    """Asserts that two optimizers have the same bits, averages and records, and that telemetry
    differs only by the rounding of its sums."""
    assert_same(ours, theirs)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        tracked, known = ours.changes._tracked[p].bits, theirs.changes._tracked[q].bits
        assert same_bits(tracked, known)
        assert not p.grad.any()
        assert ("ema" in ours.state[p]) == ("ema" in theirs.state[q])
    for found, expected in zip(ours.telemetry, theirs.telemetry, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("paged", [False, True], ids=["", "paged"])
@pytest.mark.parametrize("offset", [0, 1], ids=["", "misaligned"])
@pytest.mark.parametrize("name", LISTS)
def test_all_three_have_the_bits_of_the_reference(name, offset, paged, links):
    if paged and offset:
        pytest.skip("paging copies states, not weights")
    paging = {"paged": Paging(0, SMALLEST_PAGE)} if paged else {}
    optimizers = [
        made(STAND_IN, LISTS[name], offset, **paging),
        made("reference", LISTS[name], offset),
    ]
    # The second step is skipped; the third meets an infinity and is not.
    for step, (value, skips) in enumerate([(None, True), (math.nan, True), (math.inf, False)]):
        for optimizer in optimizers:
            optimizer.skip_nonfinite = skips
            give_grads(optimizer, step, value)
            optimizer.step()
        assert_equal(*optimizers)
        assert int(sum(group["nonfinite"] for group in optimizers[0].telemetry)) == (step > 0)
    assert int(optimizers[0].skipped_steps) == 1
    assert any(optimizers[0].changes._tracked[p].bits.any() for p in params_of(optimizers[0]))


def test_rounds_that_put_weights_aside_stay_on_the_fast_path():
    before = cuda_shim.failed_votes()
    for name in ("exact", "split", "rounded", "stochastic"):
        optimizer = made(STAND_IN, LISTS[name], sizes=[(4096,)])
        for step in range(2):
            give_grads(optimizer, step)
            optimizer.step()
    assert cuda_shim.failed_votes() == before


def test_a_captured_step_is_replayed_with_all_three(monkeypatch):
    capture = cuda_shim.Capture()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture.active)
    ours, theirs = (made(backend, LISTS["rounded"]) for backend in (STAND_IN, "reference"))
    for optimizer in (ours, theirs):
        give_grads(optimizer, 0)
        optimizer.step()
    static = [p.grad for p in params_of(ours)]
    with capture:
        ours.step()
    for step, value in enumerate([None, math.nan, None], 1):
        give_grads(theirs, step, value)
        for grad, p in zip(static, params_of(theirs), strict=True):
            grad.copy_(p.grad)
        theirs.step()
        capture.replay()
        assert_equal(ours, theirs)


@pytest.fixture
def _healthy():
    yield
    cuda_shim.fail("", 0)


@pytest.mark.usefixtures("_healthy")
@pytest.mark.parametrize("launch", range(5))
def test_a_step_is_whole_whichever_launch_fails(launch):
    """A step has five launches besides the norm: verdict, advance, and three that measure."""
    ours, theirs = (made(backend, LISTS["exact"]) for backend in (STAND_IN, "reference"))
    for optimizer in (ours, theirs):
        give_grads(optimizer, 0)
        optimizer.step()
    give_grads(theirs, 1)
    theirs.step()
    before = [t.clone() for p in params_of(ours) for t in (p.detach(), ours.state[p]["ema"])]
    give_grads(ours, 1)
    cuda_shim.fail("cudaLaunchKernelEx", OUT_OF_RESOURCES, 2 + launch)
    if launch < 4:
        with pytest.raises(RuntimeError, match="cudaErrorLaunchOutOfResources"):
            ours.step()
        now = [t for p in params_of(ours) for t in (p.detach(), ours.state[p]["ema"])]
        assert all(map(same_bits, before, now))
    else:
        # The last launch only adds the sums. The step was taken, and the next reports the error.
        ours.step()
        assert_same(ours, theirs)
        found = ours.telemetry[0]
        assert all(found[name].isnan() for name in ("grad_norm", "weight_norm", "update_norm"))
        give_grads(ours, 1)
        with pytest.raises(RuntimeError, match="telemetry of the last step, which is now NaN"):
            ours.step()
        for p in params_of(ours):
            p.grad.zero_()
        assert_same(ours, theirs)
        return
    give_grads(ours, 1)
    ours.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("paged", [False, True], ids=["", "paged"])
def test_muon_adds_the_telemetry_of_its_sweeps(paged, links):
    """The CUDA library launches one sweep per rule, which must keep each other's rows."""
    found = []
    for backend in (STAND_IN, "reference"):
        params = make_params([(16, 8), (64, 33)], FP32, 0)
        rest = make_params([(40,), (5,)], FP32, 1)
        groups = [{"params": rest, "use_muon": False}, {"params": params, "use_muon": True}]
        paging = {"paged": Paging(0, SMALLEST_PAGE)} if paged and backend == STAND_IN else {}
        optimizer = onepass.Muon(groups, lr=0.02, backend=backend, telemetry=True, **paging)
        for step in range(2):
            set_grads(params + rest, FP32, step)
            optimizer.step()
        found.append(optimizer)
    for ours, theirs in zip(found[0].telemetry, found[1].telemetry, strict=True):
        assert all(float(value) > 0 for name, value in ours.items() if name != "nonfinite")
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=0)
