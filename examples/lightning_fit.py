"""Uses an optimizer of onepass, with clipping in its step, in a Lightning module."""

import logging
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import onepass
from onepass.training import decay_groups, schedule

try:
    import lightning
except ModuleNotFoundError as error:
    raise SystemExit(f"This example needs {error.name}: pip install lightning") from None

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Regression(lightning.LightningModule):
    """A small network that learns sin(x y)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 1))

    def training_step(self, batch, index):
        """The loss of one batch."""
        x, target = batch
        return nn.functional.mse_loss(self.net(x), target)

    def configure_optimizers(self):
        """The optimizer and its learning rate schedule."""
        # The step clips the gradients: do not set Lightning's gradient_clip_val, which would clip
        # them a second time.
        optimizer = onepass.AdamW(decay_groups(self, 0.01), lr=1e-2, max_grad_norm=1.0)
        cosine = schedule(optimizer, "cosine", warmup_steps=10, total_steps=320)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": cosine, "interval": "step"},
        }


lightning.seed_everything(0, verbose=False)
x = torch.rand(2048, 2) * 4 - 2
data = TensorDataset(x, torch.sin(x[:, :1] * x[:, 1:]))
model = Regression()
trainer = lightning.Trainer(
    max_epochs=10,
    accelerator="auto",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
model = model.to("cpu")
with torch.no_grad():
    print(f"loss {nn.functional.mse_loss(model.net(x), data.tensors[1]).item():.4f}")
