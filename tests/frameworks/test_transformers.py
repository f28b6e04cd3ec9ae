"""The Trainer of transformers: resumed runs, and ``fp16`` with its GradScaler."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from onepass.integrations.transformers import optimizer_cls_and_kwargs

from . import parts


def make_trainer(cls, options, path, scaled=False, **arguments):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    tokens = torch.randint(64, (48, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    settings = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=8,
        save_steps=4,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    optimizer = cls(model.parameters(), lr=1e-3, **options)
    trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
    if scaled:  # as fp16=True sets it, which accelerate refuses on a CPU
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return trainer


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(("cls", "options"), parts.BUILT)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(cls, options, scaled, tmp_path):
    whole = make_trainer(cls, options, tmp_path / "whole", scaled)
    whole.train()
    resumed = make_trainer(cls, options, tmp_path / "resumed", scaled)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert parts.same(parts.weights(whole.model), parts.weights(resumed.model))


@pytest.mark.parametrize(("cls", "options"), parts.BUILT)
def test_the_scheduler_waits_for_a_skipped_step(cls, options, tmp_path):
    rates = []
    for each, chosen in ((cls, options), (getattr(torch.optim, cls.__name__), {})):
        trainer = make_trainer(each, chosen, tmp_path, scaled=True, logging_steps=1)
        parts.losing(next(trainer.model.parameters()), at=2)
        trainer.train()
        rates.append(
            [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
        )
        assert all(weight.isfinite().all() for weight in parts.weights(trainer.model))
    assert rates[0] == rates[1]
    assert rates[0][2] == rates[0][3]  # the skipped step and the next one


def test_bf16(tmp_path):
    trainer = make_trainer(parts.onepass.AdamW, {"states": "mx8"}, tmp_path, bf16=True)
    assert trainer.train().training_loss < 5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_settings_are_those_of_the_arguments(weight_decay, tmp_path):
    """The same run as with Trainer's own choice, which is torch's AdamW."""
    arguments = {"adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": weight_decay}
    made = make_trainer(parts.onepass.AdamW, {}, tmp_path / "ours", **arguments)
    trainers = [
        Trainer(made.model, made.args, train_dataset=made.train_dataset, **chosen)
        for chosen in ({"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs(made.args)}, {})
    ]
    start = {name: value.clone() for name, value in made.model.state_dict().items()}
    ends = []
    for trainer in trainers:
        made.model.load_state_dict(start)
        trainer.train()
        ends.append(parts.weights(made.model))
    assert type(trainers[0].optimizer.optimizer) is parts.onepass.AdamW
    assert type(trainers[1].optimizer.optimizer) is torch.optim.AdamW
    for ours, theirs in zip(*(trainer.optimizer.param_groups for trainer in trainers), strict=True):
        for key in ("lr", "initial_lr", "betas", "eps", "weight_decay"):
            assert ours[key] == theirs[key]
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
