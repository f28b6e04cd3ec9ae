"""accelerate: the optimizer and the scheduler notice a step that the GradScaler skips."""

import pytest
import torch
from accelerate import Accelerator

from . import parts


def train(cls, scaled, options):
    accelerator = Accelerator(cpu=True)
    if scaled:  # as mixed_precision="fp16" sets it, which accelerate refuses on a CPU
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = parts.small_model()
    optimizer = cls(model.parameters(), lr=0.01, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    parts.losing(next(model.parameters()), at=2)
    seen = []
    for batch in parts.batches(6):
        accelerator.backward(model(batch).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        before = parts.weights(model)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        moved = not parts.same(before, parts.weights(model))
        rate = optimizer.param_groups[0]["lr"]
        scale = accelerator.scaler.get_scale() if scaled else None
        seen.append((accelerator.optimizer_step_was_skipped, moved, rate, scale))
    return parts.weights(model), seen


@pytest.mark.parametrize(("cls", "options"), parts.BUILT)
def test_a_skipped_step(cls, options):
    _, seen = train(cls, True, options)
    twin = getattr(torch.optim, cls.__name__)
    plain = {key: value for key, value in options.items() if key != "states"}
    assert seen == train(twin, True, plain)[1]
    assert [skipped for skipped, *_ in seen] == [False, False, True, False, False, False]
    assert [moved for _, moved, *_ in seen] == [True, True, False, True, True, True]


def test_weights_are_those_of_torch():
    ours, _ = train(parts.onepass.AdamW, True, {})
    theirs, _ = train(torch.optim.AdamW, True, {})
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
