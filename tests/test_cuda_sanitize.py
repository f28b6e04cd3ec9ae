"""The program that compute-sanitizer runs, on the stand-in and on a GPU."""

from __future__ import annotations

import pytest
import torch

from . import cuda_sanitize, cuda_shim
from .support.devices import ON_GPU
from .support.targets import STAND_IN, needs_stand_in


@needs_stand_in
@pytest.mark.usefixtures("cuda_stand_in")
def test_every_list_is_stepped_on_the_stand_in(monkeypatch):
    before = cuda_shim.launches()
    lists = cuda_sanitize.steps("cpu", STAND_IN)
    assert lists == len(cuda_sanitize.STORED) + 1
    # Two steps of two launches for each list, and one norm.
    assert cuda_shim.launches() > before + 4 * lists


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_every_list_is_stepped_on_a_gpu(device):
    assert cuda_sanitize.steps(device, "cuda") == len(cuda_sanitize.STORED) + 1
    torch.cuda.synchronize()
