"""The table with which kernels encode dynamic8, at every value where a code changes."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
import torch

import onepass
from onepass.formats.dynamic8 import DYNAMIC_BLOCK, dynamic_edges, dynamic_map

from .support.targets import REFERENCE, compare, other_targets
from .test_package import ROOT

F32 = np.float32


def neighbours(values: np.ndarray) -> np.ndarray:
    """The values, and the next fp32 numbers on both sides of each."""
    values = values.astype(F32)
    return np.concatenate([np.nextafter(values, F32(-9)), values, np.nextafter(values, F32(9))])


PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "formats/dynamic8.h"

using namespace onepass;
constexpr DynamicMap kSigned = dynamic_map(true), kUnsigned = dynamic_map(false);

int main() {
  for (const auto* map : {&kSigned, &kUnsigned}) std::fwrite(map->values, 4, 256, stdout);
  for (float value; std::fread(&value, 4, 1, stdin) == 1;) {
    const uint32_t codes[] = {encode_dynamic<true>(value, kSigned),
                              encode_dynamic<false>(value, kUnsigned)};
    std::fwrite(codes, 4, 2, stdout);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on PATH")
def test_every_fp32_number_has_the_code_of_the_reference(tmp_path):
    """Compares the codes at all midpoints, at the ends of all cells, and of special values.

    A cell is a range of fp32 numbers with the same upper 15 or 16 bits. Inside a cell the code is a
    non-decreasing function of the other bits that changes once, so the numbers next to its
    midpoint, and its ends, determine the codes of all others.
    """
    first, last = (int(np.array(x, F32).view(np.uint32)) for x in (2.0**-24, 1.0))
    cells = np.arange(first >> 16, (last >> 16) + 1, dtype=np.uint32) << np.uint32(16)
    ends = neighbours(cells.view(F32))
    denormals = np.array([1, 2, 0x7FFFFF, 0x800000], np.uint32).view(F32)
    values = np.concatenate(
        [ends, neighbours(dynamic_edges(True)), neighbours(dynamic_edges(False))]
    )
    values = np.concatenate([values[np.abs(values) <= 1], denormals, [F32(0), F32(1)]])
    values = np.concatenate([values, -values]).astype(F32)

    program = tmp_path / "codes"
    command = ["g++", "-std=c++17", "-O1", "-I", ROOT / "csrc", "-x", "c++", "-", "-o", program]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    given = np.append(values, F32(np.nan))
    done = subprocess.run([program], input=given.tobytes(), capture_output=True, check=True)
    maps = np.frombuffer(done.stdout, F32, 512).reshape(2, 256)
    found = np.frombuffer(done.stdout, np.uint32, offset=2048).reshape(len(given), 2)
    for i, signed in enumerate((True, False)):
        np.testing.assert_array_equal(maps[i], dynamic_map(signed))
        wanted = np.searchsorted(dynamic_edges(signed), values, side="left")
        np.testing.assert_array_equal(found[:-1, i], wanted)
        # A NaN needs an entry of the table: the code of a block that is not finite is set later.
        assert found[-1, i] == (127 if signed else 0)


def in_blocks(values: np.ndarray, scale: float) -> torch.Tensor:
    """Whole blocks of the values times scale, each with 1 times scale as its largest value."""
    rows = np.zeros((-(-len(values) // (DYNAMIC_BLOCK - 1)), DYNAMIC_BLOCK), F32)
    rows[:, :-1].flat[: len(values)] = values
    rows[:, -1] = 1
    return torch.from_numpy(rows.ravel() * F32(scale))


def at_midpoints(target, scale):
    """A step of AdamW whose moments, the gradient and its square, are at the midpoints."""
    roots = np.sqrt(dynamic_edges(False))
    near = neighbours(neighbours(roots))
    params, grads = [], []
    for values in (neighbours(dynamic_edges(True)), near * np.resize([1, -1], len(near))):
        values = values[np.abs(values) <= 1]
        grads.append(in_blocks(values.astype(F32), scale).to(target.device))
        params.append(torch.nn.Parameter(torch.zeros_like(grads[-1])))
    optimizer = onepass.AdamW(params, betas=(0.0, 0.0), states="dynamic8", backend=target.backend)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    return optimizer


@other_targets
@pytest.mark.parametrize("power", [0, -30, 15, -70])
def test_moments_at_the_midpoints(target, power):
    """The CUDA backend computes the last power with its slow path, the others with the fast one."""
    compare(target, at_midpoints, 2.0**power)


def test_both_codes_at_every_midpoint_are_reached():
    optimizer = at_midpoints(REFERENCE, 1.0)
    codes = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    assert set(codes[0]["exp_avg"].tolist()) == set(range(256))
    assert set(codes[1]["exp_avg_sq"].tolist()) == set(range(256))
