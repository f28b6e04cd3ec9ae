"""Memory prediction for the optimizers of other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..integrations.other_libraries import CLASSES, FLASHOPTIM, TORCH_LOOPS, OptimizerClass
from .peer_formulas import FORMULAS, VERSIONS
from .predict import block_of, category_of
from .report import Bytes
from .simulate import simulate

LR = 1e-3

_COMPILED = "its step is compiled at the first call; temporary memory is not predicted"
_PLAIN = "on a CPU its step is torch code within one operator; temporary memory is not predicted"
_MANAGED = 100_000
"""bitsandbytes pages a state with at least this many elements (Optimizer8bit.get_state_buffer)."""


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library, as selected on the command line.

    Attributes:
        name: the name on the command line.
        made: the optimizer class.
        options: keyword arguments of the class.
        variant: the equivalent onepass optimizer, whose smaller variants are proposed instead.
        cuda: whether the optimizer runs only on CUDA.
        unseen: the part of the step that is not predicted, as a sentence; empty if there is none.
        unpaged: for a paged class, the same class without paging. The paged class stores its large
            states on the host.
    """

    name: str
    made: OptimizerClass
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    variant: str = ""
    cuda: bool = False
    unseen: str = ""
    unpaged: OptimizerClass | None = None

    @property
    def by_formula(self) -> bool:
        """Whether the bytes come from a formula, because a step cannot be simulated here."""
        library = self.made.library
        # FlashOptim cannot be constructed without a GPU.
        return library.name == FLASHOPTIM.name or bool(library.unavailable())

    @property
    def source(self) -> str:
        """The library and the version whose formula is used."""
        name = self.made.library.name
        return f"{name} {VERSIONS[name]}"

    def unavailable(self, device: str) -> str:
        """The reason why the optimizer cannot run on a device here; empty if it can."""
        why = self.made.library.unavailable()
        if not why and self.cuda and (device != "cuda" or not torch.cuda.is_available()):
            why = "it runs on CUDA devices only"
        return why

    def optimizer(self, params: list[torch.nn.Parameter]) -> Any:
        """Makes the optimizer over the parameters that require a gradient."""
        return self._optimizer(self.made, params)

    def _optimizer(self, made: OptimizerClass, params: list[torch.nn.Parameter]) -> Any:
        return made.make([p for p in params if p.requires_grad], lr=LR, **self.options)

    def predict(
        self, like: Sequence[torch.Tensor], grad_dtype: torch.dtype | None, device: str
    ) -> Bytes:
        """Predicts the bytes of a run with this optimizer, by a formula or a simulated step."""
        made = self.unpaged or self.made
        if self.by_formula:
            formula = FORMULAS[f"{made.library.name}.{made.name}"]
            found = formula.predict(like, grad_dtype, block_of(torch.device(device)))
        else:
            found = simulate(
                lambda params: self._optimizer(made, params), like, grad_dtype, device, categorise
            )
        if self.unpaged is not None:
            # CUDA managed memory: pages also occupy the device during a step, as far as they fit.
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
    """The category of a state of another library's optimizer, by its key."""
    return "companions" if key in ("kahan_comp", "error_bits", "master") else category_of(key)


def _torch(name: str, loop: str, suffix: str = "", **options: Any) -> Peer:
    made, variant = CLASSES[f"torch.{name}"], name.lower() + suffix
    options |= TORCH_LOOPS[loop]
    return Peer(f"torch-{variant}-{loop}", made, options, variant)


def _bitsandbytes(name: str) -> Peer:
    made, unpaged = CLASSES[f"bitsandbytes.{name}"], None
    if name.startswith("Paged"):
        unpaged = CLASSES[f"bitsandbytes.{name.removeprefix('Paged')}"]
    return _of(made, cuda=unpaged is not None, unseen="" if unpaged else _PLAIN, unpaged=unpaged)


def _of(made: OptimizerClass, name: str = "", **more: Any) -> Peer:
    name = name or f"{made.library.name}-{made.name.lower()}"
    return Peer(name, made, variant=made.twin, **more)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        *(_torch(name, loop) for name in ("AdamW", "Adam") for loop in TORCH_LOOPS),
        *(_torch("SGD", loop, "+momentum", momentum=0.9) for loop in TORCH_LOOPS),
        # Adagrad and RMSprop do not have a fused step on every device.
        *(_torch("Adagrad", loop) for loop in ("loop", "foreach")),
        *(_torch("RMSprop", loop) for loop in ("loop", "foreach")),
        *(_bitsandbytes(name) for name in ("AdamW", "AdamW8bit", "PagedAdamW8bit")),
        *(_bitsandbytes(name) for name in ("Lion8bit", "PagedLion8bit")),
        _of(CLASSES["torchao.AdamW8bit"], unseen=_COMPILED),
        _of(CLASSES["torchao.AdamW4bit"], unseen=_COMPILED),
        _of(CLASSES["flashoptim.FlashAdamW"], "flashoptim-adamw", cuda=True),
        _of(CLASSES["flashoptim.FlashLion"], "flashoptim-lion", cuda=True),
        _of(CLASSES["optimi.AdamW"]),
        _of(CLASSES["optimi.Lion"]),
        _of(CLASSES["lion-pytorch.Lion"], "lion-pytorch"),
    )
}
"""The peers by name. A prediction for a peer that cannot run here was not compared with a
measurement."""

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
"""The peers that ``--peers`` adds."""
