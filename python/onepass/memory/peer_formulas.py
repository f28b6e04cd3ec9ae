"""Formulas for the bytes of other libraries' optimizers, for use without these libraries.

Each formula was read from the source of the version that ``VERSIONS`` names. The tests compare it
with a simulated step where the library is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .report import Bytes

VERSIONS = {
    "bitsandbytes": "0.50.2",
    "torchao": "0.18.0",
    "flashoptim": "0.1.4",
    "optimi": "0.3.3",
    "lion-pytorch": "0.2.5",
}
"""Library -> the version whose source was read."""


@dataclass(frozen=True)
class StateFormula:
    """The tensors that an optimizer stores for a parameter of n elements.

    A parameter is quantized if n >= ``least`` and, with ``whole_blocks``, n is a multiple of
    ``block``. Each of its moments then takes ``code`` * n bytes, ``scale`` bytes per block and
    ``table`` bytes for the values of the codes. Otherwise each moment has n elements.

    Attributes:
        moments: number of moments.
        code: bytes per element of a quantized moment; 0 if nothing is quantized.
        block: elements per scale.
        scale: bytes per scale.
        least: the smallest number of elements that is quantized.
        whole_blocks: whether only whole numbers of blocks are quantized.
        table: bytes of the table of each quantized moment.
        shared_tables: whether all parameters share the tables.
        plain: bytes per element of a moment that is not quantized; 0 for those of the parameter.
        step: bytes of a step counter for each parameter.
        companion: bytes per element stored beside a 16-bit weight.
        largest: temporary bytes of a step, in copies of the largest parameter.
    """

    moments: int
    code: float = 0
    block: int = 1
    scale: int = 4
    least: int = 0
    whole_blocks: bool = False
    table: int = 0
    shared_tables: bool = False
    plain: int = 0
    step: int = 0
    companion: int = 0
    largest: int = 0

    def moment(self, param: torch.Tensor) -> list[int]:
        """The bytes of the tensors of one moment of a parameter."""
        n = param.numel()
        cut = self.whole_blocks and n % self.block
        if not self.code or n < self.least or cut:
            return [n * (self.plain or param.dtype.itemsize)]
        tables = [self.table] if self.table and not self.shared_tables else []
        return [int(n * self.code), -(-n // self.block) * self.scale, *tables]

    def predict(
        self, like: Sequence[torch.Tensor], grad_dtype: torch.dtype | None, block: int
    ) -> Bytes:
        """Predicts the bytes of a run.

        Args:
            like: tensors with the shapes and dtypes of the parameters.
            grad_dtype: the dtype of the gradients; None for the dtype of each parameter.
            block: the size in bytes to which storages are rounded up.
        """

        def rounded(*sizes: int) -> int:
            return sum(-(-n // block) * block for n in sizes)

        trained = [p for p in like if p.requires_grad]
        moments = sum(self.moments * rounded(*self.moment(p)) + rounded(self.step) for p in trained)
        if self.shared_tables:
            moments += self.moments * rounded(self.table)
        largest = max((p.numel() * p.dtype.itemsize for p in trained), default=0)
        narrow = [p.numel() for p in trained if p.dtype.itemsize == 2]
        return Bytes(
            weights=rounded(*(p.numel() * p.dtype.itemsize for p in like)),
            gradients=rounded(*(p.numel() * (grad_dtype or p.dtype).itemsize for p in trained)),
            moments=moments,
            companions=rounded(*(n * self.companion for n in narrow)),
            temporary=self.largest * largest,
        )


def _bitsandbytes(moments: int) -> StateFormula:
    return StateFormula(
        moments, code=1, block=256, least=4096, table=1024, shared_tables=True, plain=4
    )


def _torchao(code: float, block: int, table: int) -> StateFormula:
    return StateFormula(
        2, code=code, block=block, least=4096, whole_blocks=True, table=table, step=4
    )


def _flash(moments: int) -> StateFormula:
    return StateFormula(moments, code=1, block=32, scale=2, companion=1)


FORMULAS = {
    "bitsandbytes.AdamW": StateFormula(2, plain=4),
    "bitsandbytes.AdamW8bit": _bitsandbytes(2),
    "bitsandbytes.Lion8bit": _bitsandbytes(1),
    "torchao.AdamW8bit": _torchao(1, 256, 1024),
    "torchao.AdamW4bit": _torchao(0.5, 128, 64),
    "flashoptim.FlashAdamW": _flash(2),
    "flashoptim.FlashLion": _flash(1),
    "optimi.AdamW": StateFormula(2, companion=2, largest=1),
    "optimi.Lion": StateFormula(1, companion=2, largest=1),
    "lion-pytorch.Lion": StateFormula(1, largest=2),
}
"""By library and class. A class whose states are paged has the formula of the class without
paging."""
