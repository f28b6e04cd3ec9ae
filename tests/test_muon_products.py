"""The products of Muon: the iteration, its coefficients and the kernel for one triangle."""

from __future__ import annotations

import math

import pytest
import torch

from onepass.engine.backends import BACKENDS
from onepass.muon.coefficients import NEWTON_SCHULZ, POLAR_EXPRESS, triples_of
from onepass.muon.newton_schulz import Workspace, orthogonalize
from onepass.muon.products import TorchProducts, TritonProducts

from .cases import same_bits
from .muon_cases import error, newton_schulz


def orthogonalized(u, dtype, triples=(NEWTON_SCHULZ,) * 5, eps=1e-7, scale=1.0):
    n, rows, cols = u.shape
    x, m = u.to(dtype).clone(), min(rows, cols)
    sizes = (rows, cols), (m, m), (m, m), (1, 1), (1, 1)
    space = Workspace(*(torch.full((n, *size), math.nan, dtype=dtype) for size in sizes))
    orthogonalize(TorchProducts(), x, space, triples, eps, scale)
    return x


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (40, 8), (8, 40), (1, 9), (9, 1)])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    # The limits of fp32 and bf16 products: 24 and 8 bits, amplified by at most 3.4445^5.
    [(torch.float32, 1e-4), (torch.bfloat16, 0.05)],
)
def test_orthogonalized_matrices_match_float64(rows, cols, dtype, limit):
    u = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(rows))
    u = u.to(dtype).float()
    for steps in (0, 1, 2, 5):
        triples = (NEWTON_SCHULZ,) * steps
        found = orthogonalized(u, dtype, triples, scale=0.5)
        for one, source in zip(found, u, strict=True):
            assert error(one, 0.5 * newton_schulz(source, triples)) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [0, 60, -60, 100, -100])
def test_odd_matrices_stay_finite(power, dtype):
    """The result does not depend on a power of two unless the norm is below eps."""
    g = torch.Generator().manual_seed(1)
    rank1 = torch.randn(6, 1, generator=g) @ torch.randn(1, 9, generator=g)
    full = torch.randn(6, 9, generator=g)
    u = torch.stack([rank1, full, torch.zeros(6, 9)]).to(dtype)
    found = orthogonalized(u * 2.0**power, dtype)
    assert found.isfinite().all()
    assert not found[2].any()
    if power >= 0:
        assert same_bits(found, orthogonalized(u, dtype))
    else:
        assert found.abs().max() < 1e-5  # a norm far below eps
    scaled = orthogonalized(u * 2.0**power, dtype, eps=0.0)
    assert same_bits(scaled, orthogonalized(u, dtype, eps=0.0))


@pytest.mark.skipif(
    bool(BACKENDS["triton"].unavailable(torch.device("cpu"))), reason="no interpreter"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_triangle_kernel_is_the_whole_product(dtype):
    """Sizes below, at and above a tile, wide and tall; both triangles are written."""
    for n, rows, cols in ((2, 5, 9), (1, 64, 32), (1, 70, 33), (1, 9, 130), (2, 0, 4)):
        g = torch.Generator().manual_seed(rows)
        x = torch.randn(n, rows, cols, generator=g).to(dtype)
        m = min(rows, cols)
        results = []
        for products in (TritonProducts(), TorchProducts()):
            gram, plus = (torch.full((n, m, m), math.nan, dtype=dtype) for _ in range(2))
            products.symmetric_product(x, out=gram)
            products.symmetric_product_plus(gram, -2.5, 0.5, out=plus)
            results.append((gram, plus))
        for found, expected in zip(*results, strict=True):
            assert same_bits(found, found.mT.contiguous())
            # Sums of up to 130 rounded terms; the square of a product in bf16 amplifies its error.
            scale = expected.abs().max().item() if expected.numel() else 0.0
            limit = 1e-6 if dtype == torch.float32 else 2**-7
            assert not m or (found.float() - expected.float()).abs().max() <= 4 * limit * scale


def test_polar_express_ends_near_one():
    u = torch.randn(1, 32, 48, generator=torch.Generator().manual_seed(2))
    found = orthogonalized(u, torch.float32, POLAR_EXPRESS)
    values = torch.linalg.svdvals(found[0])
    assert (values - 1).abs().max() < 1e-2
    assert (torch.linalg.svdvals(orthogonalized(u, torch.float32)[0]) - 1).abs().max() > 0.1


def test_coefficients():
    group = {"ns_steps": 3, "ns_coefficients": [(1, 2, 3), (4, 5, 6)]}
    assert triples_of(group) == [(1, 2, 3), (4, 5, 6), (4, 5, 6)]
    assert triples_of({**group, "ns_steps": 1}) == [(1, 2, 3)]
    assert triples_of({**group, "ns_coefficients": (1, 2, 3)}) == [(1, 2, 3)] * 3
    named = {"ns_steps": 2, "ns_coefficients": "polar_express"}
    assert triples_of(named) == list(POLAR_EXPRESS[:2])
    # The polynomials of the paper, of x / 1.01, the first one also divided by 1.01 for the norm.
    x = 0.3
    a, b, c = POLAR_EXPRESS[0]
    y = x / 1.01**2
    expected = 8.28721201814563 * y - 23.595886519098837 * y**3 + 17.300387312530933 * y**5
    assert a * x + b * x**3 + c * x**5 == pytest.approx(expected, rel=1e-12)
