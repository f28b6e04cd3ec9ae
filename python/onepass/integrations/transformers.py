"""onepass in the Trainer of Hugging Face's transformers, and in trainers that derive from it."""

from __future__ import annotations

import inspect
from typing import Any

from ..optim.adam import AdamW
from ..optim.base import Optimizer


def optimizer_cls_and_kwargs(
    args: Any, optimizer: type[Optimizer] = AdamW, **options: Any
) -> tuple[type[Optimizer], dict[str, Any]]:
    """The argument ``optimizer_cls_and_kwargs`` of Trainer, with the settings of its arguments.

    If the class has the keyword, it is taken from these fields of TrainingArguments:

    - ``lr``: learning_rate
    - ``weight_decay``: weight_decay
    - ``betas``: adam_beta1 and adam_beta2, and the default of a third
    - ``eps``: adam_epsilon, if the class also has betas

    Nothing is changed, and transformers is not imported.

    Args:
        args: transformers.TrainingArguments, or a subclass such as trl.SFTConfig.
        optimizer: the class of the optimizer.
        options: further keyword arguments of the class; they replace those of the list. Trainer
            itself sets ``weight_decay`` in the parameter groups that it makes: to the value of its
            arguments, and to 0 for biases and norms.

    Returns:
        (the class, its keyword arguments).

    Raises:
        TypeError: optimizer is not a class of onepass, or has no keyword of that name.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"optimizer must be an optimizer class of onepass, not {optimizer!r}")
    known = inspect.signature(optimizer).parameters
    taken: dict[str, Any] = {"lr": args.learning_rate}
    if "weight_decay" in known:
        taken["weight_decay"] = args.weight_decay
    if "betas" in known:
        taken["betas"] = (args.adam_beta1, args.adam_beta2, *known["betas"].default[2:])
        if "eps" in known:
            taken["eps"] = args.adam_epsilon
    return optimizer, {**taken, **options}
