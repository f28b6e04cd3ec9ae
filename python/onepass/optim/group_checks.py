"""The checks of a parameter group: names of options, and their values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..formats import STATE_FORMATS, WEIGHT_FORMATS
from ..rules.group_options import option
from ..rules.option_checks import (
    check_choice,
    check_flag,
    check_fraction,
    check_lr,
    check_number,
)
from ..suggestions import nearest
from .options import STEP_WIDE


def check_names(
    group: Mapping[str, Any], known: frozenset[str], given: Mapping[str, Any], kind: str
) -> None:
    """Checks the keys of a group. Unknown ones are somebody else's, and stay: learning rate
    schedulers and frameworks keep theirs there.

    Args:
        group: only read.
        known: options of the optimizer and its groups.
        given: options of the whole step that the constructor was given.
        kind: name of the class.

    Raises:
        ValueError: an option of the whole step, or a key that is nearly an option.
    """
    for name in STEP_WIDE & group.keys():
        if name not in given:
            raise ValueError(
                f"{name} is an option of the whole step, not of one parameter group: give it to "
                f"{kind}(...), or set the optimizer's attribute"
            )
        # ZeroRedundancyOptimizer copies what it is given into the groups, and what it loads.
        if group[name] is not given[name] and group[name] != given[name]:
            warnings.warn(
                f"{name} of a parameter group is ignored: it is an option of the whole step",
                stacklevel=3,
            )
    for name in group.keys() - known:
        for meant in nearest(name, known, 1, 0.85) if isinstance(name, str) else ():
            raise ValueError(f"a parameter group has {name!r}; did you mean {meant!r}?")


def check_values(group: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is out of range, naming it."""
    check_torch_keywords(group)
    check_lr(group["lr"])
    check_number("weight_decay", group["weight_decay"])
    check_choice("states", option(group, "states"), STATE_FORMATS)
    check_choice("weights", option(group, "weights"), WEIGHT_FORMATS)
    if option(group, "ema_decay") is not None:
        check_fraction("ema_decay", option(group, "ema_decay"))
    for name in ("maximize", "decoupled_weight_decay"):
        check_flag(name, option(group, name))
    seed = option(group, "seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be an integer in [0, 2**63); got {seed!r}")


def check_torch_keywords(options: Mapping[str, Any]) -> None:
    """Raises ValueError for values of torch.optim's keywords that a step cannot honour."""
    if options.get("differentiable"):
        raise ValueError(
            "differentiable must be False: autograd does not see the step, which is one kernel"
        )
    for name in ("foreach", "fused", "capturable", "differentiable"):
        if options.get(name) is not None:
            check_flag(name, options[name])
