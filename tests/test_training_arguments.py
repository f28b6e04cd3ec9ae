"""Invalid arguments of the trainer and its parts raise errors before anything changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import onepass
from onepass.training import Trainer, decay_groups, loader, make_optimizer, schedule
from tests.training_case import data, model, same_weights


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """These models are too small for a second thread."""
    torch.set_num_threads(1)


# --- a class instead of a name ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cls"),
    [("adamw", onepass.AdamW), ("sgd", onepass.SGD), ("adamw8bit", onepass.AdamW8bit)],
)
def test_a_class_is_the_same_as_its_name(name, cls):
    x, y = data()
    trainers = [Trainer(model(), kind, 0.01) for kind in (name, cls)]
    for trainer in trainers:
        trainer.fit([(x, y)] * 3)
        assert type(trainer.optimizer) is cls
    first, second = trainers
    assert same_weights(first.model, second.model)
    for a, b in zip(first.optimizer.param_groups, second.optimizer.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


def test_a_subclass_of_ones_own_is_accepted():
    class Mine(onepass.AdamW):
        pass

    assert make_optimizer(Mine, [nn.Parameter(torch.ones(2))], 0.1).defaults["betas"] == (0.9, 0.95)


# --- the constructor -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "gpt"}, TypeError, "model must be a torch.nn.Module; got 'gpt'"),
        ({"optimizer_type": None}, ValueError, "optimizer_type must be .* got None"),
        ({"optimizer_type": ["adamw"]}, ValueError, r"optimizer_type must be .* got \['adamw'\]"),
        (
            {"optimizer_type": torch.optim.AdamW},
            TypeError,
            r"optimizer_type must be .* got torch\.optim\.adamw\.AdamW: use onepass\.AdamW",
        ),
        ({"optimizer_type": onepass.Optimizer}, TypeError, "optimizer_type must be .* subclass"),
        ({"optimizer_type": nn.Linear}, TypeError, r"optimizer_type must be .*Linear$"),
        ({"lr": "1e-3"}, ValueError, "lr must be a finite number >= 0 .*got '1e-3'"),
        ({"lr": True}, ValueError, "lr must be a finite number >= 0 .*got True"),
        ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0 .*got -1.0"),
        ({"weight_decay": "0.1"}, ValueError, "weight_decay must be .* got '0.1'"),
        ({"weight_decay": True}, ValueError, "weight_decay must be .* got True"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be .* got -0.1"),
        ({"loss": "mse"}, TypeError, r"loss must be a function loss\(output, target\); got 'mse'"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of warm_.*; got 'linear'"),
        ({"schedule": None}, ValueError, "schedule must be one of warm_restarts.*; got None"),
        ({"warmup_steps": 2.5}, TypeError, "warmup_steps must be an integer .* got 2.5"),
        ({"warmup_steps": "10"}, TypeError, "warmup_steps must be an integer .* got '10'"),
        ({"warmup_steps": True}, TypeError, "warmup_steps must be an integer .* got True"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0; got -1"),
        ({"schedule_options": 5000}, TypeError, "schedule_options must be None or a dict.*; got 5"),
        (
            {"schedule_options": {"total_step": 9}},
            ValueError,
            r"schedule_options must be one of total_steps.*'total_step'; did you mean 'total_st",
        ),
        (
            {"schedule_options": {"warmup_steps": 9}},
            ValueError,
            "each key of schedule_options must be one of",
        ),
        ({"max_grad_norm": "1"}, ValueError, "max_grad_norm must be .* got '1'"),
        ({"max_grad_norm": True}, ValueError, "max_grad_norm must be .* got True"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be .* got -1.0"),
        ({"accumulate": 1.5}, TypeError, "accumulate must be an integer .* got 1.5"),
        ({"accumulate": True}, TypeError, "accumulate must be an integer .* got True"),
        ({"accumulate": -2}, ValueError, "accumulate must be at least 1; got -2"),
        ({"amp": "bf16"}, ValueError, "amp must be None, .* got 'bf16'"),
        ({"amp": True}, ValueError, "amp must be None, .* got True"),
        ({"nan_guard": False}, ValueError, "nan_guard must be one of raise, skip, off; got False"),
        ({"betas": "0.9"}, ValueError, "betas must be a pair of numbers; got '0.9'"),
        ({"weights": "fp24"}, ValueError, "weights must be one of .* got 'fp24'"),
        ({"weights": None}, ValueError, "weights must be one of .* got None"),
        (
            {"states": "mx9", "model": nn.LayerNorm(3)},
            ValueError,
            "states must be one of .* got 'mx9'",
        ),
    ],
)
def test_the_constructor_names_the_argument_the_value_and_the_need(arguments, error, message):
    with pytest.raises(error, match=message):
        Trainer(**{"model": model(), **arguments})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("total_steps", 1e3),
        ("total_steps", True),
        ("restart_steps", "50"),
        ("restart_steps", 0),
        ("restart_factor", 1.5),
        ("decay_steps", 2.0),
        ("decay_steps", 0),
        ("final", "0.1"),
        ("final", True),
        ("final", -0.5),
    ],
)
def test_options_of_the_schedule_name_the_option_and_the_value(option, value):
    with pytest.raises((TypeError, ValueError), match=f"^{option} must be .*; got {value!r}"):
        Trainer(model(), schedule_options={option: value})


@pytest.mark.parametrize("weights", ["stochastic", "kahan", "master", "split16", "split8"])
def test_a_weight_format_that_no_parameter_can_have_is_refused(weights):
    with pytest.raises(ValueError, match=f"weights='{weights}' needs .*bfloat16.* are float32"):
        Trainer(model(), weights=weights)
    mixed = onepass.cast_model(model(), torch.bfloat16)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32, torch.bfloat16}
    Trainer(mixed, weights=weights)


def test_frozen_parameters_do_not_count_for_a_weight_format():
    net = model()
    net[0].bfloat16().requires_grad_(False)
    with pytest.raises(ValueError, match="weights='split8' needs a bfloat16 parameter that req"):
        Trainer(net, weights="split8")
    with pytest.raises(ValueError, match=r"needs a bfloat16 parameter .* model are float16"):
        Trainer(model().half(), weights="split16")


# --- fit, evaluate, save ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 1.5}, TypeError, "epochs must be an integer of at least 0; got 1.5"),
        ({"epochs": True}, TypeError, "epochs must be an integer of at least 0; got True"),
        ({"epochs": "2"}, TypeError, "epochs must be an integer of at least 0; got '2'"),
        ({"epochs": None}, TypeError, "epochs must be an integer of at least 0; got None"),
        ({"epochs": -1}, ValueError, "epochs must be at least 0; got -1"),
        ({"save_every": 5}, ValueError, "save_every=5 needs checkpoint, .* got None"),
        ({"save_every": 0, "checkpoint": "run.pt"}, ValueError, "save_every must be at least 1"),
        ({"save_every": 2.0, "checkpoint": "run.pt"}, TypeError, "save_every must be an integer"),
        ({"save_every": True, "checkpoint": "run.pt"}, TypeError, "save_every must be an integer"),
        ({"checkpoint": ""}, ValueError, "checkpoint must be the path of a file; got an empty"),
        ({"checkpoint": True}, TypeError, "checkpoint must be the path of a file; got True"),
        ({"checkpoint": b"run.pt"}, TypeError, "checkpoint must be the path of a file; got b'run"),
        ({"checkpoint": "."}, ValueError, r"checkpoint must be the path of a file; '\.' is a fold"),
        (
            {"checkpoint": "missing/run.pt"},
            FileNotFoundError,
            "checkpoint needs an existing folder; got 'missing/run.pt', and there is no folder 'mi",
        ),
        ({"progress": "no"}, ValueError, "progress must be True or False; got 'no'"),
        ({"loader": 3}, TypeError, r"loader must be an iterable of pairs .* got 3"),
    ],
)
def test_fit_refuses_an_argument_before_the_first_step(
    arguments, error, message, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(model())
    with pytest.raises(error, match=message):
        trainer.fit(**{"loader": [data()], **arguments})
    assert trainer.losses == []
    assert same_weights(trainer.model, model())
    assert not list(tmp_path.iterdir())


def test_zero_epochs_take_no_steps():
    assert Trainer(model()).fit([data()], epochs=0) == []


def test_evaluate_and_save_check_their_arguments(tmp_path):
    trainer = Trainer(model())
    with pytest.raises(TypeError, match=r"loader must be an iterable .* got None"):
        trainer.evaluate(None)
    with pytest.raises(FileNotFoundError, match="path needs an existing folder"):
        trainer.save(tmp_path / "missing" / "run.pt")


# --- load ------------------------------------------------------------------------------------


def refused(path, message, trainer=None, error=ValueError):
    """Asserts that a trainer refuses to load a path and does not change."""
    trainer = trainer or Trainer(model(), warmup_steps=3)
    trainer.train_step(*data())
    twin = model()
    twin.load_state_dict(trainer.model.state_dict())
    losses, rates = list(trainer.losses), trainer.scheduler.get_last_lr()
    with pytest.raises(error, match=message):
        trainer.load(path)
    assert same_weights(trainer.model, twin)
    assert (trainer.losses, trainer.scheduler.get_last_lr()) == (losses, rates)


FOREIGN = {
    "empty": b"",
    "text": b"lr: 1e-3\nepochs: 5\n",
    "binary": bytes(range(256)),
    "half a zip file": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_torch_cannot_read_is_named(kind, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(FOREIGN[kind])
    refused(path, r"run\.pt must be a file that Trainer\.save\(\) .* torch\.load cannot read it")


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "run.pt"
    Trainer(model()).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, r"run\.pt must be a file that Trainer\.save\(\)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (model().state_dict(), "it holds an object of type OrderedDict without a version"),
        ({"model": {}, "optimizer": {}}, "it holds an object of type dict without a version"),
        (torch.ones(3), "it holds an object of type Tensor"),
        ([1, 2], "it holds an object of type list"),
        ({"version": 1, "model": {}}, "it has no valid optimizer, scheduler, scaler, losses"),
        ({"version": 99}, "has version 99; this version of onepass reads version 1"),
    ],
    ids=["weights", "another trainer's", "tensor", "list", "version alone", "newer"],
)
def test_a_file_of_something_else_is_named(content, message, tmp_path):
    path = tmp_path / "run.pt"
    torch.save(content, path)
    refused(path, rf"run\.pt .*{message}")


def test_a_pickle_of_an_object_is_not_executed(tmp_path):
    path = tmp_path / "run.pt"
    torch.save(model(), path)
    refused(path, r"run\.pt must be a file that Trainer\.save\(\) .*\(UnpicklingError\)")


def test_a_path_that_is_no_file(tmp_path):
    refused(tmp_path / "none.pt", "none.pt", error=FileNotFoundError)
    refused(tmp_path / "none" / "run.pt", "path needs an existing folder", error=FileNotFoundError)
    refused(tmp_path, "path must be the path of a file; .* is a folder")
    refused(None, "path must be the path of a file; got None", error=TypeError)


def test_a_checkpoint_of_another_schedule_or_loss_scale(tmp_path):
    path = tmp_path / "run.pt"
    Trainer(model(), warmup_steps=0).save(path)
    refused(path, r"run\.pt was saved with another schedule")
    Trainer(model(), warmup_steps=3, schedule="constant").save(path)
    refused(path, r"run\.pt was saved with another schedule")
    Trainer(model(), warmup_steps=3).save(path)
    scaled = Trainer(model(), warmup_steps=3, amp=torch.float16)
    refused(path, r"run\.pt has no loss scale, which amp=torch.float16 needs", scaled)


# --- decay_groups, schedules and loaders -----------------------------------------------------


@pytest.mark.parametrize("size", [2.0, "4", True])
def test_a_batch_size_is_an_integer(size):
    with pytest.raises(TypeError, match=f"batch_size must be an integer .* got {size!r}"):
        loader(TensorDataset(*data()), size)


def test_the_parts_check_their_own_arguments():
    with pytest.raises(TypeError, match="seed must be an integer of at least 0; got None"):
        loader(TensorDataset(*data()), seed=None)
    with pytest.raises(ValueError, match="weight_decay must be a finite number >= 0; got 'no'"):
        decay_groups(model(), "no")
    optimizer = onepass.SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match=r"warmup_steps must be an integer .* got 1\.0"):
        schedule(optimizer, warmup_steps=1.0)
