"""Checks of checkpoints: saved by four ranks, loaded by any number, also after a rank died."""

from __future__ import annotations

import copy
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

import onepass

from .zero_model import LR, backward, make, sharded, whole

BF16 = torch.bfloat16
RUNS = {
    "fp32": (onepass.AdamW, torch.float32, {}),
    "stochastic": (onepass.AdamW, BF16, {"states": "bf16", "weights": "stochastic"}),
    "mx8": (onepass.AdamW, BF16, {"states": "mx8", "weights": "split8", "max_grad_norm": 1e6}),
    "mx4": (onepass.AdamW, torch.float32, {"states": "mx4"}),
    "lion": (onepass.Lion, torch.float32, {"states": "mx8"}),
    "sgd": (onepass.SGD, torch.float32, {"states": "dynamic8", "momentum": 0.9}),
}
AT_BLOCKS = {"mx8", "mx4", "lion"}  # the others are elementwise, or have longer blocks

FLAT = {name: [False] for name in RUNS} | {"fp32": [True], "mx8": [True, False]}
# Formats in which encoding decoded values gives the same codes. For mx8 this holds because no block
# here has a maximum that was rounded down from a power of two.
REPEATED = {"fp32", "stochastic", "mx8", "lion"}


def _rows(param):
    """Whether every block of 32 lies within a row."""
    return param.dim() == 2 and param.shape[1] % 32 == 0


def _made(name):
    kind, dtype, options = RUNS[name]
    model = sharded(make(dtype))
    return model, kind(model.parameters(), lr=LR, **options)


def _train(model, optimizer, steps):
    """Takes steps with gradients that do not depend on the number of ranks."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            over = getattr(p, "device_mesh", None)
            if over is not None:
                grad = DTensor.from_local(grad, over, [Replicate()], run_check=False)
                grad = grad.redistribute(over, p.placements)
            p.grad = grad
        optimizer.step()
    optimizer.zero_grad()


def _options(flat):
    return StateDictOptions(flatten_optimizer_state_dict=flat)


def _load(model, optimizer, path, flat):
    found = get_state_dict(model, optimizer, options=_options(flat))
    state = dict(zip(("model", "optimizer"), found, strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(flat),
    )


def save(directory, checkpoints):
    """Saves every run after three steps in each way, and the weights after six steps."""
    for name in RUNS:
        model, optimizer = _made(name)
        _train(model, optimizer, range(3))
        for flat in FLAT[name]:
            found = get_state_dict(model, optimizer, options=_options(flat))
            state = dict(zip(("model", "optimizer"), found, strict=True))
            dcp.save(state, checkpoint_id=f"{checkpoints}/{name}{flat}")
        _train(model, optimizer, range(3, 6))
        end = [whole(p).detach() for p in model.parameters()]
        if dist.get_rank() == 0:
            torch.save(end, f"{checkpoints}/{name}")
    dist.barrier()


def a_run_goes_on_from_what_four_ranks_saved(directory, checkpoints):
    world = dist.get_world_size()
    for name in RUNS:
        for flat in FLAT[name]:
            model, optimizer = _made(name)
            _load(model, optimizer, f"{checkpoints}/{name}{flat}", flat)
            _train(model, optimizer, range(3, 6))
            assert {float(s["step"]) for s in optimizer.state.values()} == {6.0}
            end = torch.load(f"{checkpoints}/{name}")
            for (key, p), q in zip(model.named_parameters(), end, strict=True):
                # The weights have the same bits if codes are loaded as they are, or if the same
                # shards encode fp32 values to the same codes.
                again = world == 4 and name in REPEATED
                if again or name in ("fp32", "stochastic") or (name in AT_BLOCKS and _rows(p)):
                    assert torch.equal(whole(p), q), (name, key)
                else:
                    steps = 2 if name == "lion" else 1
                    assert (whole(p) - q).abs().max() <= steps * 3 * LR, (name, key)


def a_whole_state_dict_serves_one_process(directory, checkpoints):
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for name in ("stochastic", "mx8", "mx4"):
        kind, dtype, options = RUNS[name]
        model, optimizer = _made(name)
        _train(model, optimizer, range(2))
        # On one rank the state dicts share memory with the model and the optimizer.
        weights, states = copy.deepcopy(get_state_dict(model, optimizer, options=full))
        twin = make(dtype)
        reference = kind(twin.parameters(), lr=LR, **options)
        if dist.get_rank() == 0:
            set_state_dict(twin, reference, model_state_dict=weights, optim_state_dict=states)
            _train(twin, reference, range(2, 4))
        _train(model, optimizer, range(2, 4))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            ours = whole(p)
            if dist.get_rank() == 0 and (name == "stochastic" or _rows(p)):
                assert torch.equal(ours, q)
        # Load the full state dict into every rank.
        again, other = _made(name)
        back = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(again, weights, options=back)
        set_optimizer_state_dict(again, other, states, options=back)
        _train(again, other, range(2, 4))
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            same = torch.equal(whole(p), whole(q))
            assert same or (name not in REPEATED and not _rows(p))


def codes_are_not_read_as_values(directory, checkpoints):
    """Loading a checkpoint into states of another format is an error."""
    model, optimizer = _made("fp32")
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    for group in state["optimizer"]["state"].values():
        group["exp_avg_scale"] = torch.zeros((), dtype=torch.uint8)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load(state, checkpoint_id=f"{checkpoints}/mx8False")


def weights_in_fp32_are_dtensors(directory, checkpoints):
    model, optimizer = _made("mx8")
    _train(model, optimizer, range(2))
    full = onepass.full_precision_state_dict(model, optimizer)
    for name, p in model.named_parameters():
        assert full[name].dtype == torch.float32
        assert full[name].placements == p.placements
        # The fp32 weights differ from the bf16 weights, by at most half of the bf16 spacing.
        below = (whole(full[name]) - whole(p).float()).abs()
        assert (below <= whole(p).float().abs() * 2**-8).all()
        assert below.any()
    fp32 = onepass.convert_state_dict(optimizer, optimizer.state_dict(), "fp32", "native")
    first = fp32["state"][0]
    assert set(first) == {"step", "exp_avg", "exp_avg_sq"}
    assert first["exp_avg"].dtype == torch.float32
    assert first["exp_avg"].shape == model.embedding.weight.shape


def a_rank_dies(directory, checkpoints):
    """The second rank is killed in its third step; the others must fail soon."""
    model = sharded(make())
    optimizer = onepass.AdamW(model.parameters(), lr=LR, max_grad_norm=1.0)
    for step in range(100):
        optimizer.zero_grad()
        if step == 2:
            found = get_state_dict(model, optimizer)
            state = dict(zip(("model", "optimizer"), found, strict=True))
            dcp.save(state, checkpoint_id=f"{checkpoints}/last")
            dist.barrier()
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            start = time.monotonic()
        try:
            backward(model, step)
            optimizer.step()
        except RuntimeError as error:
            assert step >= 2
            seconds = time.monotonic() - start
            told = "in time" if seconds < 25 else f"after {seconds:.0f} s"
            raise RuntimeError(f"heard of it {told}") from error


def the_last_checkpoint_loads(directory, checkpoints):
    model, optimizer = _made("fp32")
    _load(model, optimizer, f"{checkpoints}/last", False)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    before = [whole(p).clone() for p in model.parameters()]
    backward(model, 2)
    optimizer.step()
    assert not any(map(torch.equal, before, map(whole, model.parameters())))


def fsdp1_takes_states_of_the_shape_of_their_parameter(directory, checkpoints):
    """Formats with states of other shapes raise an error on every rank, which names the format."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    formats = [("fp32", "native"), ("bf16", "stochastic"), ("bf16", "split16")]
    formats += [(states, "native") for states in ("mx8", "mx4", "dynamic8")]
    for original in (True, False):
        for states, weights in formats:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 8)).bfloat16()
            model = FSDP(model, use_orig_params=original, device_id=torch.device("cpu"))
            optimizer = onepass.AdamW(model.parameters(), states=states, weights=weights)
            model(torch.ones(3, 8, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            assert optimizer.state_dict()["state"]
            for ask in (FSDP.optim_state_dict, get_optimizer_state_dict):
                if weights == "split16" or states in ("mx8", "mx4", "dynamic8"):
                    named = weights if weights == "split16" else states
                    with pytest.raises(ValueError, match=f"optim_state_dict cannot take {named}"):
                        ask(model, optimizer)
                else:
                    assert ask(model, optimizer)["state"]


EVERYWHERE = [
    fsdp1_takes_states_of_the_shape_of_their_parameter,
    a_run_goes_on_from_what_four_ranks_saved,
    a_whole_state_dict_serves_one_process,
    codes_are_not_read_as_values,
    weights_in_fp32_are_dtensors,
]
