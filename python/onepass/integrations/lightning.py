"""A callback for Lightning. Importing this module imports Lightning."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ..optim.base import Optimizer
from ..rules.group_options import option
from .frameworks import import_framework

_lightning = import_framework("lightning.pytorch", "pytorch_lightning", package="lightning")


class AveragedWeights(_lightning.Callback):  # type: ignore[misc, name-defined]
    """Validates, tests and predicts with the averages that ``ema_decay`` keeps.

    The weights change in place when an evaluation begins and get their old bits back when it ends
    or raises, see :meth:`onepass.Optimizer.averaged_weights`. Before the first step there are no
    averages, and the weights stay as they are. Optimizers of other libraries, and those without
    ``ema_decay``, are left alone. Checkpoints contain the weights of the training, and the averages
    as states of the optimizer.

    The base class is Callback of lightning.pytorch, or of pytorch_lightning if the package
    lightning is not installed.

    Raises:
        ValueError: training starts, and no optimizer keeps averages.
    """

    def __init__(self) -> None:
        super().__init__()
        self._swapped = ExitStack()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Raises ValueError if no optimizer of the trainer keeps averages."""
        if not any(_averages(optimizer) for optimizer in trainer.optimizers):
            raise ValueError("AveragedWeights needs an optimizer of onepass with ema_decay")

    def _swap_in(self, trainer: Any, module: Any) -> None:
        self._swapped.close()
        for optimizer in trainer.optimizers:
            if _averages(optimizer):
                self._swapped.enter_context(optimizer.averaged_weights())

    def _swap_out(self, trainer: Any, module: Any) -> None:
        self._swapped.close()

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = _swap_out

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Puts the weights of the training back."""
        self._swapped.close()


def _averages(optimizer: Any) -> bool:
    """Whether an optimizer is one of onepass that keeps averages."""
    return isinstance(optimizer, Optimizer) and any(
        option(group, "ema_decay") is not None for group in optimizer.param_groups
    )
