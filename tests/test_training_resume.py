"""Checkpoints of the trainer: a resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

import contextlib
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from onepass.training import Trainer
from tests import killed_run
from tests.support.processes import forked
from tests.training_case import data, model, same_weights


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """These models are too small for a second thread."""
    torch.set_num_threads(1)


# --- checkpoints -----------------------------------------------------------------------------


class Jittered(Dataset):
    """A data set whose samples draw from every global random generator."""

    def __init__(self):
        self.x, self.y = data(40)

    def __len__(self):
        return 40

    def __getitem__(self, i):
        jitter = torch.randn(6) + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[i] + 0.01 * jitter, self.y[i]


def loaders():
    own = torch.Generator().manual_seed(5)
    return {
        "global generator": DataLoader(Jittered(), 4, shuffle=True),
        "its own generator": DataLoader(Jittered(), 4, shuffle=True, generator=own),
        "with replacement": DataLoader(
            Jittered(), 4, sampler=torch.utils.data.RandomSampler(Jittered(), True, 100)
        ),
    }


def run(which, path=None, epochs=2, crash_at=None, **options):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    net = nn.Sequential(model(), nn.Dropout(0.1))
    trainer = Trainer(net, "adamw", 0.01, warmup_steps=3, **options)
    if path is not None and path.exists():
        trainer.load(path)
        assert crash_at is None
    batches = loaders()[which]
    if crash_at is not None:
        inner = trainer.train_step

        def step(x, y):
            if len(trainer.losses) == crash_at:
                raise KeyboardInterrupt
            return inner(x, y)

        trainer.train_step = step
    with contextlib.suppress(KeyboardInterrupt):
        trainer.fit(batches, epochs, checkpoint=path, save_every=None if path is None else 3)
    return trainer


@pytest.mark.parametrize("which", loaders())
@pytest.mark.parametrize("crash_at", [1, 5, 10, 14])
def test_a_resumed_run_is_the_uninterrupted_one(which, crash_at, tmp_path):
    """Crashes before the first checkpoint, within an epoch, at its end and in the second epoch."""
    path = tmp_path / "run.pt"
    whole = run(which)
    run(which, path, crash_at=crash_at)
    resumed = run(which, path)
    assert resumed.losses == whole.losses
    assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize(
    "options",
    [{"states": "mx8"}, {"states": "mx4", "schedule": "constant"}, {"amp": torch.float16}],
    ids=str,
)
def test_resuming_is_exact_with_formats_and_scales(options, tmp_path):
    path = tmp_path / "run.pt"
    whole = run("global generator", **options)
    run("global generator", path, crash_at=7, **options)
    assert same_weights(run("global generator", path, **options).model, whole.model)


def test_another_fit_trains_on():
    trainer, (x, y) = Trainer(model(), "adamw"), data()
    trainer.fit([(x, y)], epochs=2)
    trainer.fit([(x, y)], epochs=3)
    assert (trainer.epoch, len(trainer.losses)) == (5, 5)


def test_a_finished_run_started_again_has_nothing_to_do(tmp_path):
    path = tmp_path / "run.pt"
    done = run("global generator", path)
    again = run("global generator", path)
    assert again.losses == done.losses
    assert same_weights(again.model, done.model)


def test_a_checkpoint_survives_a_save_that_fails(tmp_path, monkeypatch):
    path, trainer = tmp_path / "run.pt", Trainer(model())
    trainer.save(path)
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        trainer.save(path)
    assert path.read_bytes() == before


def test_a_checkpoint_of_something_else_changes_nothing(tmp_path):
    path = tmp_path / "run.pt"
    other = Trainer(nn.Linear(6, 3))
    other.save(path)
    trainer = Trainer(model())
    with pytest.raises(ValueError, match=r"is of another model: '0\.weight' has shape none there"):
        trainer.load(path)
    fast = Trainer(model(1), "momentum")
    fast.train_step(*data())
    fast.save(path)
    trainer.train_step(*data())
    twin = Trainer(model())
    twin.train_step(*data())
    with pytest.raises(ValueError, match="another kind of optimizer"):
        trainer.load(path)
    assert same_weights(trainer.model, twin.model)


def test_resuming_with_too_few_batches_is_an_error(tmp_path):
    path, (x, y) = tmp_path / "run.pt", data()
    trainer = Trainer(model())
    with pytest.raises(ZeroDivisionError):
        trainer.fit(((x, y) if i < 3 else 1 / 0 for i in range(4)), checkpoint=path, save_every=1)
    trainer.load(path)
    with pytest.raises(ValueError, match="gave 2 batches; the checkpoint had done 3"):
        trainer.fit([(x, y)] * 2)


def start(path, slow):
    """Starts the training of killed_run.py; returns the process and its messages."""
    context = forked()
    mine, theirs = context.Pipe()
    process = context.Process(target=killed_run.main, args=(path, slow, theirs))
    process.start()
    theirs.close()
    return process, mine


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    """A run killed by SIGKILL at a random time, in a step or in a save, resumes to the same
    bits."""
    whole = killed_run.digest(killed_run.train(None))
    path = tmp_path / "run.pt"
    chance = random.Random(time.time_ns())
    process, pipe = start(path, slow=True)
    assert pipe.recv() == "training"
    time.sleep(chance.uniform(0.2, 2.0))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = torch.load(path, weights_only=True) if path.exists() else {"losses": []}
    assert len(done["losses"]) < killed_run.STEPS
    process, pipe = start(path, slow=False)
    assert pipe.recv() == whole, f"killed after {len(done['losses'])} saved steps"
    process.join()
