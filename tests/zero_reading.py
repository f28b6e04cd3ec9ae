"""Reading the gradients of DTensors: which changes a plan detects."""

from __future__ import annotations

import torch
from torch.distributed.tensor import Shard, distribute_tensor

import onepass

from .zero_model import mesh


def gradients_are_read_where_they_are(directory, checkpoints):
    over = mesh()

    def cut(*shape):
        return distribute_tensor(torch.randn(*shape), over, [Shard(0)])

    params = [torch.nn.Parameter(cut(8, 2)) for _ in range(75)]
    locals = [torch.nn.Parameter(p.to_local().detach().clone()) for p in params]
    ours, theirs = onepass.AdamW(params), onepass.AdamW(locals)
    plans, versions = [], [p._version for p in params]
    for step in range(6):
        for p, q in zip(params, locals, strict=True):
            if not (step and p is params[20]):  # this parameter keeps its gradient
                p.grad = cut(8, 2)
            q.grad = p.grad.to_local()
        if step == 4:
            moved = params[40].to_local().detach().clone()
            params[40]._local_tensor = moved
        if step == 5:
            params[50].grad = None
            locals[50].grad = None
        ours.step()
        theirs.step()
        for p, q in zip(params, locals, strict=True):
            assert torch.equal(p.to_local(), q)
        plans.append(ours._plan)
    assert plans[0] is plans[1] is plans[2] is plans[3]
    assert plans[3] is not plans[4] is not plans[5]
    assert params[40].to_local().data_ptr() == moved.data_ptr()
    rose = [p._version - before for p, before in zip(params, versions, strict=True)]
    assert rose == [5 if p is params[50] else 6 for p in params]


EVERYWHERE = [gradients_are_read_where_they_are]
