"""The targets of the backend suite: the ways in which a step can run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import pytest
import torch

import onepass
from onepass.engine.backends import BACKENDS

from .. import cuda_shim
from .comparison import assert_same
from .thorough import THOROUGH

STAND_IN = "cuda-stand-in"
"""Name of the backend that runs csrc/cuda compiled by g++ against tests/cuda_shim."""


@dataclass(frozen=True)
class Target:
    """A backend on a device.

    Attributes:
        name: name of the target in test ids.
        backend: name of the backend.
        device: device type of the parameters.
        isa: instruction set of the cpu backend; empty for the other backends.
        interpreted: whether a step takes about 1,000 times as long as on the CPU. Tests then use
            fewer parameters and pairs of options instead of all combinations.
    """

    name: str
    backend: str
    device: str = "cpu"
    isa: str = ""
    interpreted: bool = False

    def why_not(self) -> str:
        """The reason why the target is unavailable; empty if it is available."""
        if self.device == "cuda":
            return "" if torch.cuda.is_available() else "there is no GPU"
        if self.backend == STAND_IN:
            return cuda_shim.why_not()
        if self.isa:
            return onepass.ops.missing or (
                "" if self.isa in instruction_sets() else f"no kernels for {self.isa} here"
            )
        return BACKENDS[self.backend].unavailable(torch.device("cpu"))

    @contextmanager
    def selected(self) -> Iterator[None]:
        """Selects the instruction set, or registers the stand-in, within a with block."""
        if self.isa:
            before = onepass.ops.cpu_isa()
            onepass.ops.cpu_isa(self.isa)
            try:
                yield
            finally:
                onepass.ops.cpu_isa(before)
        elif self.backend == STAND_IN:
            with stand_in():
                yield
        else:
            yield


@lru_cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that the CPU library supports on this machine."""
    before, found = onepass.ops.cpu_isa(), []
    for name in ("plain", "avx2", "avx512"):
        try:
            onepass.ops.cpu_isa(name)
        except RuntimeError:
            continue
        found.append(name)
    onepass.ops.cpu_isa(before)
    return tuple(found)


@contextmanager
def stand_in() -> Iterator[None]:
    """Registers the stand-in for the CUDA backend as STAND_IN within a with block."""
    BACKENDS[STAND_IN] = _stand_in()
    try:
        yield
    finally:
        del BACKENDS[STAND_IN]


needs_stand_in = pytest.mark.skipif(bool(why := cuda_shim.why_not()), reason=why or "-")


@lru_cache
def _stand_in() -> cuda_shim.ShimBackend:
    return cuda_shim.ShimBackend()


REFERENCE = Target("reference", "reference")
TARGETS = (
    REFERENCE,
    Target("cpu-plain", "cpu", isa="plain"),
    Target("cpu-avx2", "cpu", isa="avx2"),
    Target("cpu-avx512", "cpu", isa="avx512"),
    Target("triton-interpreter", "triton", interpreted=True),
    Target(STAND_IN, STAND_IN),
    Target("cuda-gpu", "cuda", "cuda"),
    Target("triton-gpu", "triton", "cuda"),
)


def _parameter(target: Target, *values: Any, id: str = "") -> Any:
    marks = [pytest.mark.skipif(bool(why := target.why_not()), reason=why or "-")]
    if target.device == "cuda":
        marks.append(pytest.mark.gpu)
    return pytest.param(target, *values, id="-".join(filter(None, (target.name, id))), marks=marks)


def on_targets(chosen: Callable[[Target], bool] = lambda target: True) -> Any:
    """A decorator that runs a test on each target, or on the chosen ones."""
    params = [_parameter(target) for target in TARGETS if chosen(target)]
    return pytest.mark.parametrize("target", params, indirect=True)


def one_in(count: int, target: Target, number: int) -> None:
    """Skips a row on the interpreter unless its number is a multiple of ``count``.

    Args:
        number: index of the row among those of the test.
    """
    if target.interpreted and number % count and not THOROUGH:
        pytest.skip(f"the interpreter runs one row in {count}; make test-all runs every row")


every_target = on_targets()
other_targets = on_targets(lambda target: target is not REFERENCE)
"""Every target but the reference, for tests that compare with the reference."""


def with_rows(names: str, rows: Callable[[Target], Iterable[tuple[str, tuple[Any, ...]]]]) -> Any:
    """A decorator for a test that compares with the reference and has other rows on each target.

    Args:
        names: names of the values of a row, separated by commas.
        rows: returns the rows of a target, each with its id and its values.
    """
    found: dict[str, list[Any]] = {}
    for target in TARGETS[1:]:
        # An unavailable target shows one skipped row.
        for name, values in islice(rows(target), 1 if target.why_not() else None):
            found.setdefault(name, []).append(_parameter(target, *values, id=name))
    # Rows are ordered by id and then by target, so that the reference runs each row once.
    params = [param for row in found.values() for param in row]
    return pytest.mark.parametrize(f"target,{names}", params, indirect=["target"])


@lru_cache(maxsize=4)
def of_reference(recipe: Callable[..., Any], *args: Any) -> Any:
    """The result of a recipe on the reference, which is kept for the next targets."""
    return recipe(REFERENCE, *args)


def compare(target: Target, recipe: Callable[..., Any], *args: Any) -> None:
    """Asserts that a recipe has the same bits on a target and on the reference.

    Args:
        recipe: called as recipe(target, *args); returns an optimizer after some steps or a list of
            tensors.
    """
    found, expected = recipe(target, *args), of_reference(recipe, *args)
    assert_same(found, expected)
