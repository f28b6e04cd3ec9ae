"""Uses an optimizer of onepass in Hugging Face's Trainer, with a small GPT-2."""

import tempfile

import torch

import onepass
from onepass.training import decay_groups

try:
    import accelerate  # noqa: F401  Trainer needs it
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(
        f"This example needs {error.name}: pip install transformers accelerate"
    ) from None

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config)

# The task is counting: each sequence starts at a random number and increases by one.
starts = torch.arange(256) % 64
sequences = (starts[:, None] + torch.arange(16)) % 64
dataset = [{"input_ids": row, "labels": row} for row in sequences]

optimizer = onepass.AdamW(decay_groups(model, 0.01), lr=5e-3, betas=(0.9, 0.95), states="bf16")
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=64)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            num_train_epochs=4,
            per_device_train_batch_size=16,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    loss = trainer.evaluate(eval_dataset=dataset[:64])["eval_loss"]
print(f"loss {loss:.4f}")
