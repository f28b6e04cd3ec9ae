"""Saving and loading an optimizer in the random runs over several ranks; see random_ranks.py."""

from __future__ import annotations

import copy
import io
import pickle

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.distributed.checkpoint.state_dict import StateDictOptions

from .random_ranks_case import (
    WITH_WEIGHTS,
    is_saved_as_codes,
)


def whole(run, how):
    """The state of model and optimizer for torch.distributed.checkpoint."""
    flat = StateDictOptions(flatten_optimizer_state_dict=how == "dcp_flat")
    model, optimizer = state_dicts.get_state_dict(run.model, run.optimizer, options=flat)
    return {"model": model, "optimizer": optimizer}


def load_whole(run, how, path):
    dcp.load(state := whole(run, how), checkpoint_id=path)
    flat = StateDictOptions(flatten_optimizer_state_dict=how == "dcp_flat")
    loaded = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    state_dicts.set_state_dict(run.model, run.optimizer, **loaded, options=flat)


def torch_saved(state):
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


IN_MEMORY = {  # name: (function that saves a state dict, function that loads it)
    "torch_save": (torch_saved, lambda saved: torch.load(io.BytesIO(saved), weights_only=False)),
    "pickle": (pickle.dumps, pickle.loads),
    "deepcopy": (copy.deepcopy, copy.deepcopy),
}
# "direct" saves optimizer.state_dict() with dcp; "exchange" loads the dcp checkpoint into
# torch.optim, saves it again and loads that into onepass.
WAYS = (*IN_MEMORY, *WITH_WEIGHTS, "direct", "full")


def save(run, how, path):
    """Saves the states, and for the ways in WITH_WEIGHTS the weights too."""
    if how in IN_MEMORY:
        return IN_MEMORY[how][0](run.optimizer.state_dict())
    if how == "direct":
        return dcp.save({"optimizer": run.optimizer.state_dict()}, checkpoint_id=path)
    if how in WITH_WEIGHTS:
        write = dcp.async_save if how == "async" else dcp.save
        return write(whole(run, how), checkpoint_id=path, process_group=run.saving)
    # The other functions may return tensors that share memory with the states.
    if how == "full":
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        got = state_dicts.get_optimizer_state_dict(run.model, run.optimizer, options=full)
        return copy.deepcopy(got)
    run.optimizer.consolidate_state_dict(0)
    found = [copy.deepcopy(run.optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def load(run, how, path, saved):
    """Loads the result of save() into a new optimizer."""
    old = run.optimizer.state_dict() if how == "direct" else None
    run.make_optimizer()
    if how == "exchange":
        run.optimizer = run.case.torch(run.params, **run.case.torch_options)
        load_whole(run, how, path)
        path += "-torch"
        save(run, how, path)
        run.make_optimizer()
    if how in WITH_WEIGHTS:
        load_whole(run, how, path)
    elif how == "full":
        spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state_dicts.set_optimizer_state_dict(run.model, run.optimizer, saved, options=spread)
    else:
        if how == "direct":
            dcp.load(state := {"optimizer": old}, checkpoint_id=path)
            saved = state["optimizer"]
        saved = IN_MEMORY[how][1](saved) if how in IN_MEMORY else saved
        run.optimizer.load_state_dict(saved)
    # Values that a block format saves as fp32 are rounded again when they are loaded.
    formats = {run.held_in, run.formats["states"]}
    run.lose_bits(lambda p: all(is_saved_as_codes(p, states) for states in formats))
