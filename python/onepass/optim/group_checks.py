"""Checks the option names and values of a parameter group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..rules import Rule
from ..rules.group_options import GROUP_KEYWORDS, option
from ..rules.option_checks import check_flag, check_lr, check_number
from ..suggestions import nearest
from .keywords import STEP_WIDE, TORCH_KEYWORDS


def check_names(
    group: Mapping[str, Any], known: frozenset[str], given: Mapping[str, Any], kind: str
) -> None:
    """Checks the keys of a group.

    Unknown keys are allowed, because learning rate schedulers and frameworks store their own keys
    in groups.

    Args:
        group: the parameter group; it is only read.
        known: options of the optimizer and its groups.
        given: options of the whole step that were passed to the constructor.
        kind: name of the optimizer class.

    Raises:
        ValueError: a key is an option of the whole step, or a probable misspelling of an option.
    """
    for name in STEP_WIDE & group.keys():
        if name not in given:
            raise ValueError(
                f"{name} is an option of the whole step, not of a parameter group: pass it to "
                f"{kind}(...), or set the attribute of the optimizer"
            )
        # ZeroRedundancyOptimizer copies constructor keywords and loaded options into the groups.
        if group[name] is not given[name] and group[name] != given[name]:
            warnings.warn(
                f"{name} in a parameter group is ignored, because it is an option of the whole "
                "step: set the attribute of the optimizer",
                stacklevel=3,
            )
    for name in group.keys() - known:
        for meant in nearest(name, known, 1, 0.85) if isinstance(name, str) else ():
            raise ValueError(f"a parameter group has the key {name!r}; did you mean {meant!r}?")


def check_values(group: Mapping[str, Any]) -> None:
    """Raises ValueError if an option is out of range; the message names the option."""
    check_torch_keywords(group)
    check_lr(group["lr"])
    check_number("weight_decay", group["weight_decay"])
    for keyword in GROUP_KEYWORDS:
        keyword.check(keyword.name, option(group, keyword.name))


def check_rule_options(group: Mapping[str, Any], rule: Rule, kind: str) -> None:
    """Checks the options that only some rules have, and that groups store only if they are set.

    Args:
        group: the parameter group; it is only read.
        rule: the rule of the optimizer.
        kind: name of the optimizer class.

    Raises:
        ValueError: an option is not True or False, or the rule does not have it, or weight decay
            is cautious but not decoupled.
    """
    known = {flag.option for flag in rule.flags} | {flag.name for flag in rule.flags}
    for name in ("eps_in_sqrt", "cautious_weight_decay"):
        value = option(group, name)
        check_flag(name, value)
        if value and name not in known:
            raise ValueError(f"{kind} has no option {name!r}; got {name}={value!r}")
    if option(group, "cautious_weight_decay") and not option(group, "decoupled_weight_decay"):
        raise ValueError(
            "cautious_weight_decay=True needs decoupled_weight_decay=True: decay that is added to "
            "the gradient is part of the update, whose sign decides on the decay"
        )


def check_torch_keywords(options: Mapping[str, Any]) -> None:
    """Raises ValueError if a keyword of torch.optim has a value that is not supported."""
    for keyword in TORCH_KEYWORDS:
        keyword.check(keyword.name, options.get(keyword.name))
