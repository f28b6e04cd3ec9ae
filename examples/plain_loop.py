"""A plain PyTorch training loop: parameter groups, clipping in the step, a torch scheduler."""

import torch
from torch import nn

import onepass
from onepass.training import decay_groups

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 1))
optimizer = onepass.AdamW(
    decay_groups(model, weight_decay=0.01), lr=1e-2, betas=(0.9, 0.95), max_grad_norm=1.0
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)

for step in range(300):
    x = torch.rand(128, 2) * 4 - 2
    target = torch.sin(x[:, :1] * x[:, 1:])
    loss = nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}, gradient norm {optimizer.grad_norm:.3f}")
print(f"loss {loss.item():.4f}")
