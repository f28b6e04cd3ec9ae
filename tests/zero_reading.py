"""How the gradients of DTensors are read: what is noticed, what is counted, doing without slots."""

from __future__ import annotations

import torch
from torch.distributed.tensor import Shard, distribute_tensor

import onepass
from onepass import reader

from .zero_model import mesh, pair, same_as_twin, train


def gradients_are_read_where_they_are(directory, checkpoints):
    over = mesh()

    def cut(*shape):
        return distribute_tensor(torch.randn(*shape), over, [Shard(0)])

    # More than are looked up at once, and not a multiple of it.
    params = [torch.nn.Parameter(cut(8, 2)) for _ in range(75)]
    locals = [torch.nn.Parameter(p.to_local().detach().clone()) for p in params]
    ours, theirs = onepass.AdamW(params), onepass.AdamW(locals)
    plans, versions = [], [p._version for p in params]
    for step in range(6):
        for p, q in zip(params, locals, strict=True):
            if not (step and p is params[20]):  # that one keeps its gradient
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
        if step < 5:
            assert plans[step]._parts[0]._read() == (not onepass.ops.missing)
    assert plans[0] is plans[1] is plans[2] is plans[3]
    assert plans[3] is not plans[4] is not plans[5]
    assert params[40].to_local().data_ptr() == moved.data_ptr()
    rose = [p._version - before for p, before in zip(params, versions, strict=True)]
    assert rose == [5 if p is params[50] else 6 for p in params]


def dtensors_of_unknown_slots_are_asked(directory, checkpoints):
    known = reader._slots
    reader._slots = lambda tensors: None
    try:
        four = pair(onepass.AdamW)
        train(*four, 3)
        assert not four[1]._plan._parts[0]._read()
    finally:
        reader._slots = known
    assert same_as_twin(*four) == len(list(four[0].parameters()))


def the_place_of_gradients_is_known_and_only_used_for_them(directory, checkpoints):
    tensor = distribute_tensor(torch.randn(8, 2), mesh(), [Shard(0)])
    assert all(reader._chain())
    assert reader._slots([tensor]) is not None

    class Own(type(tensor)):
        grad = property(lambda self: None)

    tensor.__class__ = Own
    assert reader._slots([tensor]) is None


EVERYWHERE = [
    gradients_are_read_where_they_are,
    dtensors_of_unknown_slots_are_asked,
    the_place_of_gradients_is_known_and_only_used_for_them,
]
