"""Compares one AdamW step of an installed onepass with torch.optim in fp64.

wheel_check.sh runs this script. With the argument "cuda", the CUDA library must load and register
its ops as well.
"""

import platform
import subprocess
import sys
from pathlib import Path

import torch

import onepass

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2

package = Path(onepass.__file__).resolve()
if not package.is_relative_to(Path(sys.argv[1]).resolve()):
    sys.exit(f"wheel_check: {package} is not the installed package")

torch.manual_seed(0)
start, grad = torch.randn(1025), torch.randn(1025)

# With backend="cpu" the constructor raises an error if the CPU library does not load.
param = start.clone().requires_grad_()
param.grad = grad.clone()
onepass.AdamW([param], LR, BETAS, EPS, WEIGHT_DECAY, backend="cpu").step()

oracle = start.double().requires_grad_()
oracle.grad = grad.double()
torch.optim.AdamW([oracle], LR, BETAS, EPS, WEIGHT_DECAY).step()

# Two roundings of the weight. A step moves the weight by about LR, so the tolerance is relative to
# LR for smaller weights.
tolerance = 2 * torch.finfo(torch.float32).eps * start.abs().clamp(min=LR)
error = ((param.detach().double() - oracle.detach()).abs() / tolerance).max().item()
if not error <= 1 or torch.equal(param.detach(), start):
    sys.exit(f"wheel_check: one AdamW step is off by {error:.2f} of what is allowed")

if sys.argv[2:] == ["cuda"]:
    if missing := onepass.ops.cuda_missing():
        sys.exit(f"wheel_check: {missing}")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = [name for name in onepass.ops.OPS if name != "cpu_isa"]
    if absent := [name for name in ops if not has(f"onepass::{name}", "CUDA")]:
        sys.exit(f"wheel_check: the CUDA library loads, but lacks {absent}")
    print(f"wheel_check: the CUDA library loads, with {len(ops)} ops for CUDA tensors")

info = [sys.executable, "-m", "onepass", "info"]
found = subprocess.run(info, check=True, capture_output=True, text=True).stdout
(cuda,) = [line.split(maxsplit=1)[1] for line in found.splitlines() if line.startswith("  cuda ")]
print(f"wheel_check: onepass info says of cuda: {cuda}")
if sys.argv[2:] == ["cuda"] and not torch.cuda.is_available() and "no GPU" not in cuda:
    sys.exit("wheel_check: it should say that there is no GPU")

print(
    f"wheel_check: passed under Python {platform.python_version()} with torch {torch.__version__}: "
    f"error {error:.2f} of what is allowed"
)
