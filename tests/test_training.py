"""The trainer against the equivalent training loop in plain torch, and invalid input."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import onepass
from onepass.training import OPTIMIZERS, Trainer, loader
from tests.training_case import data, model, same_weights

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """These models are too small for a second thread."""
    torch.set_num_threads(1)


# --- comparison with a loop on torch.optim ---------------------------------------------------

TWINS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.95)}),
}


class PaperLion(torch.optim.Optimizer):
    """Program 1 of the Lion paper; torch.optim has no Lion."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(0.9 * m + 0.1 * p.grad)
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
                m.mul_(0.99).add_(p.grad, alpha=0.01)


def written_out(make, options, lr, x, y, steps):
    """The training loop of the guide with torch.optim, including clipping and the schedule."""
    net = model()
    decayed = [net[0].weight, net[3].weight]
    rest = [net[0].bias, net[1].weight, net[1].bias, net[3].bias]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = make(groups, lr=lr, **options)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 11, 1.0, 10)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 50, 2)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, restarts], [10])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.mse_loss(net(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", [*TWINS, "lion"])
def test_the_trainer_reaches_the_loss_of_the_loop_written_out(name):
    """The losses of 80 steps agree. Training amplifies rounding differences; the largest relative
    difference measured was 3.2 eps."""
    make, options = TWINS.get(name, (PaperLion, {}))
    # RMSprop's first steps have the size sqrt(1 / (1 - alpha)) lr. With lr = 0.01 training
    # oscillates and is chaotic.
    lr, (x, y) = 0.001 if name == "rmsprop" else 0.01, data()
    trainer = Trainer(model(), name, lr)
    ours = [trainer.train_step(x, y) for _ in range(80)]
    theirs = written_out(make, options, lr, x, y, 80)
    assert ours[0] == theirs[0]
    assert ours[-1] < 0.7 * ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=10 * EPS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_by_its_name(name):
    trainer = Trainer(model(), name, 0.01, schedule="constant")
    x, y = data()
    for _ in range(40):
        trainer.train_step(x, y)
    assert trainer.losses[-1] < 0.9 * trainer.losses[0]


@pytest.mark.parametrize("states", onepass.formats.STATE_FORMATS)
def test_every_format_of_states_by_its_name(states):
    trainer = Trainer(model(), "lion", 0.01, states=states, schedule="constant")
    x, y = data()
    for _ in range(40):
        trainer.train_step(x, y)
    assert trainer.losses[-1] < 0.9 * trainer.losses[0]
    assert {g.get("states", "fp32") for g in trainer.optimizer.param_groups} >= {states}


def test_accumulation_is_the_gradient_of_the_batch():
    x, y = data(50)  # not a multiple of 4: batches of 13, 13, 13 and 11
    whole, parts = Trainer(model(), "sgd", 0.1), Trainer(model(), "sgd", 0.1, accumulate=4)
    for _ in range(5):
        a, b = whole.train_step(x, y), parts.train_step(x, y)
        assert a == pytest.approx(b, rel=8 * EPS)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_amp_learns(amp):
    trainer = Trainer(model(), "adamw", 0.01, amp=amp, schedule="constant")
    assert trainer.scaler.is_enabled() == (amp == torch.float16)
    x, y = data()
    for _ in range(40):
        trainer.train_step(x, y)
    assert trainer.losses[-1] < 0.7 * trainer.losses[0]
    plain = Trainer(model(), "adamw", 0.01, schedule="constant")
    assert plain.train_step(x, y) != trainer.losses[0]  # the precision was reduced


# --- batches and loaders ---------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "steps"), [(None, 1), (1, 50), (16, 4)])
def test_batch_stochastic_and_mini_batch(batch_size, steps):
    dataset = TensorDataset(*data(50))
    trainer = Trainer(model(), "sgd", 0.01)
    assert len(trainer.fit(loader(dataset, batch_size), epochs=2)) == 2 * steps
    first, again = (next(iter(loader(dataset, batch_size, seed=3))) for _ in range(2))
    assert torch.equal(first[0], again[0])


def test_a_loader_needs_samples():
    with pytest.raises(ValueError, match="the dataset is empty"):
        loader(TensorDataset(torch.zeros(0, 6)))
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        loader(TensorDataset(torch.zeros(2, 6)), 0)


# --- invalid input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer_type": "adanw"}, r"one of sgd, .*lion.*'adanw'; did you mean 'adamw'"),
        ({"schedule": "linear"}, "schedule must be one of warm_restarts, cosine, constant, wsd"),
        ({"nan_guard": "rise"}, r"did you mean 'raise'"),
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"amp": torch.float32}, "amp must be None, torch.bfloat16 or torch.float16"),
        ({"states": "mx9"}, "states must be"),
    ],
)
def test_a_wrong_argument_lists_the_known(arguments, message):
    with pytest.raises(ValueError, match=message):
        Trainer(model(), **arguments)


def test_an_unknown_option_is_not_swallowed():
    with pytest.raises(TypeError, match="bettas"):
        Trainer(model(), bettas=(0.9, 0.99))


def test_an_empty_loader_is_an_error():
    trainer = Trainer(model())
    for method in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match="loader must give at least one batch"):
            method([])
    once = iter([data()])
    with pytest.raises(ValueError, match="an iterator can be used once"):
        trainer.fit(once, epochs=2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_loss_or_gradient_changes_nothing(where, tmp_path):
    def loss(output, target):
        value = functional.mse_loss(output, target)
        # sqrt has an infinite derivative at 0, and 0 * inf is NaN: the loss is finite, the gradient
        # is not.
        bad = torch.sqrt((output * 0).sum()) if where == "gradient" else value * torch.inf
        return value + bad if target[0, 0] > 1e6 else value

    x, y = data()
    broken = y.clone()
    broken[0, 0] = 1e7
    trainer, twin = (Trainer(model(), "adamw", loss=loss) for _ in range(2))
    path = tmp_path / "run.pt"
    with pytest.raises(FloatingPointError, match=r"step 2: the (loss|gradients' norm) is"):
        trainer.fit([(x, y), (x, y), (x, broken)], checkpoint=path, save_every=1)
    twin.fit([(x, y), (x, y)])
    assert same_weights(trainer.model, twin.model)
    assert trainer.losses == twin.losses
    resumed = Trainer(model(1), "adamw", loss=loss)
    resumed.load(path)
    assert same_weights(resumed.model, twin.model)


@pytest.mark.parametrize("bad", [torch.nan, 1e30])
def test_nonfinite_batch_is_skipped(bad):
    """The square of 1e30 is infinite in fp32, and so are the mean and the recorded loss."""
    x, y = data()
    skipping = Trainer(model(), "momentum", nan_guard="skip", schedule="constant", warmup_steps=0)
    plain = Trainer(model(), "momentum", schedule="constant", warmup_steps=0)
    skipping.fit([(x, y), (x, y + bad), (x, y)])
    plain.fit([(x, y), (x, y)])
    assert same_weights(skipping.model, plain.model)
    assert skipping.losses[::2] == plain.losses
    assert not np.isfinite(skipping.losses[1])


# --- the progress bar ------------------------------------------------------------------------


def test_a_bar_only_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    trainer = Trainer(model())
    trainer.fit([data()] * 3)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer.fit([data()] * 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "loss" in err
