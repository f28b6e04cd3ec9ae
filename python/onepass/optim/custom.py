"""Optimizer classes of custom rules."""

from __future__ import annotations

import inspect
from typing import Any

from .. import optim
from ..rules import RULES
from ..rules.custom import Rule, check_definition
from ..rules.group_options import DEFAULTS
from .base import Optimizer
from .keywords import KEYWORDS

_RESERVED = frozenset(
    (
        *("self", "params", "options", "step", "param_names", "initial_lr"),
        *(keyword.name for keyword in KEYWORDS),
        *DEFAULTS,
    )
)
"""Names that an option cannot have: the keywords of every class, and keys of parameter groups."""


def optimizer(rule: Rule, name: str | None = None) -> type[Optimizer]:
    """Makes an optimizer class of a custom rule.

    The class has the options of the rule in the order of ``rule.options``, and the keywords of
    every onepass class (:class:`onepass.optim.options.Options`). Its step runs the Triton functions
    of the rule on a GPU, in one launch for the whole list. On a CPU it runs the NumPy update over
    tiles, which is exact but slow; a warning says so. Formats, clipping, paging, averages, FSDP2
    and state dicts work as in the other classes.

    Args:
        rule: a rule with ``options``; docs/own-rule.md describes its parts.
        name: the name of the class; by default the rule's name in CamelCase. Assign the class to a
            global variable of this name, in the module of ``rule.update``, if its instances are
            pickled.

    Returns:
        A subclass of :class:`onepass.optim.Optimizer`.

    Raises:
        ValueError: a name is taken, or the update is inconsistent: it returns a wrong number of
            states, is not finite at zero, mixes elements or does not compute in float32.
        TypeError: a part of the rule has the wrong type.
    """
    if name is None:
        name = "".join(word.capitalize() for word in rule.name.split("_"))
    _check_names(rule, name)
    check_definition(rule)
    options = rule.options or {}
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            *(inspect.Parameter(key, positional) for key in ("self", "params")),
            *(inspect.Parameter(k, positional, default=o.default) for k, o in options.items()),
            inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD),
        ]
    )

    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        defaults = {key: given[key] for key in options}
        Optimizer.__init__(self, given["params"], defaults, **given["options"])

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    text = inspect.cleandoc(rule.update.__doc__ or f"The rule {rule.name!r}.")
    members = {
        "__init__": __init__,
        "__doc__": text,
        "__module__": rule.update.__module__,
        "rule": rule,
        "decoupled": rule.decoupled,
    }
    return type(name, (Optimizer,), members)


def _check_names(rule: Rule, name: str) -> None:
    """Raises ValueError if the name of a rule, of its class or of an option is taken."""
    which = f"rule {rule.name!r}"
    if rule.name in RULES:
        raise ValueError(f"{which}: onepass has a rule of this name; choose another name")
    if name in optim.__all__:
        raise ValueError(f"{which}: onepass has a class {name}; choose another name")
    for option in rule.options or ():
        if option in _RESERVED:
            raise ValueError(f"{which}: the option {option!r} is taken; choose another name")
