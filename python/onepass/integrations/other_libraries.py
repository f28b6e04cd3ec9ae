"""A table of the optimizer classes of other libraries: package, module and fixed arguments.

Memory prediction (onepass/memory/peers.py) and the benchmark (onepass_tools/benchmark/peers.py)
extend this table.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from ..optim.registry import classes


@dataclass(frozen=True)
class Library:
    """A module with optimizer classes.

    Attributes:
        name: used in the names of its optimizers on the command line.
        distribution: the package to install.
        module: the module to import.
    """

    name: str
    distribution: str
    module: str

    def unavailable(self) -> str:
        """The reason why the library cannot be used here; empty if it can."""
        return load(self.distribution, self.module)[1]

    @property
    def version(self) -> str | None:
        """The installed version; None if the library is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


@dataclass(frozen=True)
class OptimizerClass:
    """An optimizer class of another library.

    Attributes:
        library: the library that defines the class.
        name: the name of the class.
        twin: the name, in lower case, of the onepass class with the same update.
        fixed: keyword arguments that are always passed.
    """

    library: Library
    name: str
    twin: str
    fixed: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def make(self, params: Iterable[torch.Tensor], **options: Any) -> Any:
        """Makes a new optimizer over the parameters.

        Raises:
            ImportError: the library is not available; the message gives the reason.
        """
        module, why = load(self.library.distribution, self.library.module)
        if module is None:
            raise ImportError(why)
        return getattr(module, self.name)(params, **self.fixed, **options)


@cache
def load(distribution: str, module: str) -> tuple[Any, str]:
    """Returns (the module, an empty string), or (None, the reason why the import failed)."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None, f"{distribution} is not installed"
    silenced, output = logging.root.manager.disable, io.StringIO()
    try:
        # Silence missing-kernel warnings on import.
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), redirect_stderr(output), redirect_stdout(output):
            warnings.simplefilter("ignore")
            return importlib.import_module(module), ""
    except Exception as error:  # third-party code can raise anything
        first = (str(error).splitlines() or [""])[0]
        return None, f"{distribution} does not import: {type(error).__name__}: {first}"
    finally:
        logging.disable(silenced)


TORCH = Library("torch", "torch", "torch.optim")
BITSANDBYTES = Library("bitsandbytes", "bitsandbytes", "bitsandbytes.optim")
TORCHAO = Library("torchao", "torchao", "torchao.optim")
FLASHOPTIM = Library("flashoptim", "flashoptim", "flashoptim")
OPTIMI = Library("optimi", "torch-optimi", "optimi")
LION_PYTORCH = Library("lion-pytorch", "lion-pytorch", "lion_pytorch")
DEEPSPEED = Library("deepspeed", "deepspeed", "deepspeed.ops")

TORCH_LOOPS: dict[str, dict[str, bool]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
"""The ways in which torch.optim steps through a list of parameters, as keyword arguments."""


def _deepspeed(module: str, name: str, twin: str, **fixed: Any) -> OptimizerClass:
    library = Library(DEEPSPEED.name, DEEPSPEED.distribution, f"{DEEPSPEED.module}.{module}")
    return OptimizerClass(library, name, twin, fixed)


def _found() -> Iterator[OptimizerClass]:
    for twin, ours in classes().items():
        name = ours.__name__
        if hasattr(torch.optim, name):
            yield OptimizerClass(TORCH, name, twin)
        # Onepass classes with other defaults, such as AdamW8bit, have the names of bitsandbytes.
        if ours.rule.bitsandbytes is None or ours.default_states != "fp32" or ours.default_paged:
            continue
        paged = ["Paged"] if f"paged{twin}" in classes() else []
        for prefix in ("", *paged):
            for suffix in ("", "8bit", "32bit"):
                yield OptimizerClass(BITSANDBYTES, f"{prefix}{name}{suffix}", twin)
    # _AdamW is the base class of the other two, with fp32 states and the same step.
    for name in ("_AdamW", "AdamW8bit", "AdamW4bit"):
        yield OptimizerClass(TORCHAO, name, "adamw")
    for name, twin in (("FlashAdamW", "adamw"), ("FlashLion", "lion"), ("FlashSGD", "sgd")):
        yield OptimizerClass(FLASHOPTIM, name, twin)
    for name, twin in (("AdamW", "adamw"), ("Lion", "lion"), ("SGD", "sgd")):
        yield OptimizerClass(OPTIMI, name, twin)
    yield OptimizerClass(LION_PYTORCH, "Lion", "lion")
    yield _deepspeed("adam", "DeepSpeedCPUAdam", "adamw", adamw_mode=True)
    yield _deepspeed("adam", "FusedAdam", "adamw", adam_w_mode=True)
    yield _deepspeed("lion", "DeepSpeedCPULion", "lion")
    yield _deepspeed("adagrad", "DeepSpeedCPUAdagrad", "adagrad")


CLASSES: dict[str, OptimizerClass] = {
    f"{found.library.name}.{found.name}": found for found in _found()
}
"""The classes by library and name: ``"bitsandbytes.AdamW8bit"``."""
