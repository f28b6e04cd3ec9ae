"""Muon on a GPU: products, sweeps of every backend, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

import onepass
from onepass.muon.batches import Settings
from onepass.muon.products import TorchProducts, TritonProducts

from .cases import same_bits, set_grads
from .muon_cases import REST, both_groups, error, matrices, newton_schulz

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def on_gpu(params):
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def stepped(backend, precision="fp32", products=None, **options):
    params, rest = on_gpu(matrices()), on_gpu(matrices(1, shapes=REST))
    groups = both_groups(params, rest)
    muon = onepass.Muon(groups, 0.02, backend=backend, precision=precision, **options)
    if products is not None:
        muon.products = Settings(precision, 1 << 28, products)
    for step in range(3):
        set_grads(params + rest, torch.float32, step)
        muon.step()
    return [*params, *rest]


@pytest.mark.parametrize("options", [{}, {"states": "bf16", "max_grad_norm": 1.0}], ids=str)
def test_backends_have_the_same_bits(options):
    """The products run on the same device, so all bits are equal, also from run to run."""
    expected = stepped("reference", **options)
    for backend in ("cuda", "triton", "cuda"):
        assert all(map(same_bits, stepped(backend, **options), expected))


@pytest.mark.parametrize("products", [TorchProducts(), TritonProducts()])
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_the_direction_is_that_of_float64(products, precision, limit):
    for shape in ((64, 64), (70, 200), (300, 65)):
        param = torch.nn.Parameter(torch.zeros(shape, device="cuda"))
        param.grad = torch.randn(shape, device="cuda")
        muon = onepass.Muon([param], 1.0, 0.0, precision=precision)
        muon.products = Settings(precision, 1 << 28, products)
        muon.step()
        expected = newton_schulz(0.0975 * param.grad) * max(1, shape[0] / shape[1]) ** 0.5
        assert error(-param.detach(), expected) < limit


def test_a_captured_step_replays():
    params, plain = on_gpu(matrices()), on_gpu(matrices())
    one, two = onepass.Muon(params, 0.02), onepass.Muon(plain, 0.02)
    for owned, muon in ((params, one), (plain, two)):
        set_grads(owned, torch.float32, 0)
        muon.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.step()
    for _ in range(3):
        graph.replay()
        two.step()
    assert all(map(same_bits, params, plain))
