"""Other libraries' optimizers in the same table."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .predict import category_of
from .report import Bytes
from .simulate import CannotSimulateError, simulate

Make = Callable[[Any, list[torch.nn.Parameter]], Any]
"""(the peer's module, parameters) -> an optimizer."""

_COMPILED = "its step is compiled when it first runs: what that has of temporaries is not predicted"
_PLAIN = "on a CPU its step is plain torch within one operator: temporaries there are not predicted"
_MANAGED = 100_000
"""Elements from which bitsandbytes pages a state (Optimizer8bit.get_state_buffer)."""


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    Attributes:
        name: on the command line.
        distribution, module: what is installed, what is imported.
        make: see Make.
        rule: of onepass that does the same; what a smaller variant is looked for of.
        cuda: it runs on CUDA alone.
        unseen: what of its step is not predicted, where something is not.
        unpaged: the same without paging; its large states are on the host here.
        formula: predicts it where it cannot be simulated.
    """

    name: str
    distribution: str
    module: str
    make: Make
    rule: str
    cuda: bool = False
    unseen: str = ""
    unpaged: Make | None = None
    formula: Callable[[Sequence[torch.Tensor], torch.dtype | None], Bytes] | None = None

    def unavailable(self, device: str) -> str:
        """Why it cannot run on a device here; empty when it can."""
        why = _load(self.distribution, self.module)[1]
        if not why and self.cuda and (device != "cuda" or not torch.cuda.is_available()):
            why = "runs on CUDA only"
        return why

    def optimizer(self, params: list[torch.nn.Parameter]) -> Any:
        """A new one over those parameters that are trained."""
        module = _load(self.distribution, self.module)[0]
        return self.make(module, [p for p in params if p.requires_grad])

    def predict(
        self, like: Sequence[torch.Tensor], grad_dtype: torch.dtype | None, device: str
    ) -> Bytes:
        """The bytes of a run with it, see simulate().

        Raises:
            CannotSimulateError: nothing predicts it here.
        """
        if self.formula is not None:
            return self.formula(like, grad_dtype)
        module, why = _load(self.distribution, self.module)
        if module is None:
            raise CannotSimulateError(why)
        make = self.unpaged or self.make
        found = simulate(
            lambda params: make(module, [p for p in params if p.requires_grad]),
            like,
            grad_dtype,
            device,
            categorise,
        )
        if self.unpaged is not None:
            # Managed memory: it is on the device too while it is worked on, as much as fits.
            codes = torch.uint8 if "8bit" in self.name else torch.float32
            states = 1 if "lion" in self.name else 2
            moved = sum(
                states * p.numel() * codes.itemsize
                for p in like
                if p.requires_grad and p.numel() >= _MANAGED
            )
            found = found + Bytes(moments=-moved, host=moved)
        if self.unseen == _COMPILED:
            found = found + Bytes(temporary=-found.temporary)
        return found


def categorise(key: str) -> str:
    """The category of a peer's state by its key."""
    return "companions" if key in ("kahan_comp", "error_bits", "master") else category_of(key)


@cache
def _load(distribution: str, module: str) -> tuple[Any, str]:
    """(the module, why it could not be imported)."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None, f"{distribution} is not installed"
    try:
        # What some print of kernels that they do not find is nobody's business here.
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(module), ""
    except Exception as error:  # a peer may fail in any way
        first = (str(error).splitlines() or [""])[0]
        return None, f"{distribution} does not import: {type(error).__name__}: {first}"
    finally:
        logging.disable(logging.NOTSET)


def _flash(moments: int) -> Callable[[Sequence[torch.Tensor], torch.dtype | None], Bytes]:
    """FlashOptim 0.1.4, read in its source: a byte a moment and an fp16 scale for each 32 elements,
    and a byte beside a weight of 16 bits (master_weight_bits=24); nothing temporary."""

    def predict(like: Sequence[torch.Tensor], grad_dtype: torch.dtype | None) -> Bytes:
        trained = [p for p in like if p.requires_grad]
        scales = sum(-(-p.numel() // 32) for p in trained)
        return Bytes(
            weights=sum(p.numel() * p.dtype.itemsize for p in like),
            gradients=sum(p.numel() * (grad_dtype or p.dtype).itemsize for p in trained),
            moments=moments * (sum(p.numel() for p in trained) + 2 * scales),
            companions=sum(p.numel() for p in trained if p.dtype.itemsize == 2),
        )

    return predict


def _named(name: str, **options: Any) -> Make:
    return lambda module, params: getattr(module, name)(params, lr=1e-3, **options)


def _torch(name: str, how: str, suffix: str = "", **options: Any) -> Peer:
    kinds = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    make = _named(name, **kinds[how], **options)
    lower = name.lower()
    # torch has no fused RMSprop; the rule of AdamW is Adam's.
    return Peer(f"torch-{lower}{suffix}-{how}", "torch", "torch.optim", make, lower + suffix)


def _bitsandbytes(name: str, rule: str) -> Peer:
    lower = name.lower()
    unpaged = _named(name.removeprefix("Paged")) if name.startswith("Paged") else None
    return Peer(
        f"bitsandbytes-{lower}",
        "bitsandbytes",
        "bitsandbytes.optim",
        _named(name),
        rule,
        cuda=unpaged is not None,
        unseen="" if unpaged else _PLAIN,
        unpaged=unpaged,
    )


def _torchao(name: str) -> Peer:
    make = _named(name)
    return Peer(
        f"torchao-{name.lower()}", "torchao", "torchao.optim", make, "adamw", unseen=_COMPILED
    )


def _flashoptim(rule: str, name: str, moments: int) -> Peer:
    return Peer(
        f"flashoptim-{rule}",
        "flashoptim",
        "flashoptim",
        _named(name),
        rule,
        cuda=True,
        formula=_flash(moments),
    )


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        *(_torch(name, how) for name in ("AdamW", "Adam") for how in ("loop", "foreach", "fused")),
        *(_torch("SGD", how, "+momentum", momentum=0.9) for how in ("loop", "foreach", "fused")),
        *(_torch("Adagrad", how) for how in ("loop", "foreach")),
        *(_torch("RMSprop", how) for how in ("loop", "foreach")),
        *(_bitsandbytes(name, "adamw") for name in ("AdamW", "AdamW8bit", "PagedAdamW8bit")),
        *(_bitsandbytes(name, "lion") for name in ("Lion8bit", "PagedLion8bit")),
        *(_torchao(name) for name in ("AdamW8bit", "AdamW4bit")),
        _flashoptim("adamw", "FlashAdamW", 2),
        _flashoptim("lion", "FlashLion", 1),
        Peer("optimi-adamw", "torch-optimi", "optimi", _named("AdamW"), "adamw"),
        Peer("optimi-lion", "torch-optimi", "optimi", _named("Lion"), "lion"),
        Peer("lion-pytorch", "lion-pytorch", "lion_pytorch", _named("Lion"), "lion"),
    )
}
"""By name. What is predicted of one that cannot run here has not been measured here."""

DEFAULT = (
    "torch-adamw-foreach",
    "torch-adamw-fused",
    "bitsandbytes-adamw8bit",
    "bitsandbytes-pagedadamw8bit",
    "torchao-adamw8bit",
    "torchao-adamw4bit",
    "flashoptim-adamw",
    "optimi-adamw",
    "lion-pytorch",
)
"""What ``--peers`` adds."""
