"""Custom rules: their options, and the checks of their definition.

The parts that a custom rule omits are derived from its options, so that a rule can consist of
options, states and the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..numerics.arrays import F32, States
from . import base
from .base import DECOUPLED_DECAY, OWN, Flag, Group, Numbers, Slot, StepOf, derive_options, keep
from .option_checks import check_flag, check_real, check_tuple, is_number

KINDS = ("first", "second", "relative", "weight")
SHARED = ("lr", "weight_decay")
"""Options that every class has and checks; they have their own columns in the options table."""

VALUES = np.array([0.0, -0.0, 1e-40, -3e-39, 1e-20, -1e-7, 0.1, -0.5, 1.0, -3.0, 200.0], np.float32)
"""Weights and gradients with which an update is tried."""

Derive = Callable[[Numbers, StepOf], tuple[float, ...]]


class Option(NamedTuple):
    """An option of a custom rule.

    Attributes:
        default: a number, a boolean or a tuple of numbers.
        check: called with the option's name and value; raises a ValueError that names the option.
            :mod:`onepass.rules.option_checks` has checks such as ``check_fraction``.
    """

    default: Any
    check: Callable[[str, Any], None]


@dataclass(frozen=True, eq=False, repr=False)
class Rule(base.Rule):
    """A rule of your own; :func:`onepass.optimizer` makes an optimizer class of it.

    docs/own-rule.md describes the parts, :class:`onepass.rules.base.Rule` lists them all. A rule
    needs a name, slots, an update and options::

        def signum(param, grad, states, h, flags):
            lr, weight_decay, beta = h
            exp_avg = beta * states[0] + (1 - beta) * grad
            return param - (lr * np.sign(exp_avg) + weight_decay * param), (exp_avg,)

        rule = onepass.Rule(
            "signum", slots=(Slot("exp_avg", "first"),), update=signum, options={"beta": 0.9}
        )

    Raises:
        TypeError: a default is not a number, a boolean or a tuple of numbers.
        ValueError: a name is not an identifier, a flag or the start of a state has no option, a
            function in Triton is missing, ``derive`` or ``advance`` raises, or a limit of
            :mod:`onepass.rules.limits` is exceeded.
    """

    def __post_init__(self) -> None:
        if self.options is None:
            object.__setattr__(self, "options", {})
        for name, value in complete(self).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "scalars", len(_scalars(self, defaults_of(self))))
        super().__post_init__()


# --- parts that follow from the options ----------------------------------------------------------


def complete(rule: Rule) -> dict[str, Any]:
    """The fields of a custom rule that follow from its options.

    Args:
        rule: a rule with ``options``, whose other fields are as the caller gave them.

    Raises:
        TypeError: a default is not a number, a boolean or a tuple of numbers.
        ValueError: a name is not an identifier, a flag or the start of a state has no option, or a
            function in Triton is missing.
    """
    options = _named_options(rule)
    booleans = [name for name, one in options.items() if isinstance(one.default, bool)]
    own_names = [name for name in options if name not in (*SHARED, *booleans)]
    known = {flag.option or flag.name for flag in rule.flags}
    starts = {slot.starts_at for slot in rule.slots if isinstance(slot, Slot) and slot.starts_at}
    for name in (known - {"decoupled_weight_decay"} | starts) - options.keys():
        raise ValueError(f"rule {rule.name!r} has no option {name!r}, which a flag or state needs")
    # dataclasses.replace passes the functions below on; take those that the caller gave.
    given_derive: Derive = getattr(rule.derive, "given", rule.derive)
    given_check: Callable[[Group], None] = getattr(rule.check, "given", rule.check)

    def own(group: Group) -> tuple[float, ...]:
        return tuple(number for name in own_names for number in _numbers(group[name]))

    def check(group: Group) -> None:
        for name in options:
            if name not in SHARED:
                options[name].check(name, group[name])
        decoupled = bool(group.get("decoupled_weight_decay"))
        if DECOUPLED_DECAY not in rule.flags and decoupled != rule.decoupled:
            raise ValueError(
                f"decoupled_weight_decay must be {rule.decoupled}: the rule {rule.name!r} has no "
                f"other weight decay; got {decoupled}"
            )
        given_check(group)

    default_derive = given_derive is derive_options
    end = OWN + len(own({name: one.default for name, one in options.items()}))

    def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
        return given_derive(o[:end] if default_derive else o, step)

    derive.given, check.given = given_derive, given_check  # type: ignore[attr-defined]
    _check_triton(rule, own_derive=not default_derive)
    return {
        "options": options,
        "derive": derive,
        "flags": (*rule.flags, *(Flag(name) for name in booleans if name not in known)),
        "own": own,
        "check": check,
        "needs_step": rule.needs_step or not default_derive,
    }


def defaults_of(rule: base.Rule) -> dict[str, Any]:
    """The options of a custom rule with their defaults, and its kind of weight decay."""
    assert rule.options is not None
    return {
        **{name: option.default for name, option in rule.options.items()},
        "decoupled_weight_decay": rule.decoupled,
    }


def variants_of(rule: Rule) -> Iterator[tuple[int, dict[str, Any]]]:
    """(flag bits, group) of each combination of flags that the rule accepts.

    A number whose truth value sets a flag is its default, or 0.5 if that is 0, and 0.
    """
    defaults = defaults_of(rule)
    for bits in range(1 << len(rule.flags)):
        group = dict(defaults)
        for i, flag in enumerate(rule.flags):
            name, on = flag.option or flag.name, bool(bits >> i & 1)
            number = not isinstance(defaults[name], bool)
            group[name] = (defaults[name] or 0.5 if on else 0.0) if number else on
        try:
            rule.check(group)
        except ValueError:
            continue
        yield bits, group


def _scalars(rule: Rule, group: Group) -> tuple[float, ...]:
    """The scalars of the first step.

    Raises:
        ValueError: ``derive`` or ``advance`` raises or returns something else than numbers.
    """
    row = rule.options_row(group)
    start = tuple(scalar.starts_at for scalar in rule.scalar_states)
    try:
        advanced = tuple(map(float, rule.advance(row, 1, start)))
        found = tuple(map(float, rule.derive(row, StepOf(1, True, advanced))))
    except Exception as error:  # the user's code can raise anything
        raise ValueError(
            f"rule {rule.name!r}: derive or advance raised {type(error).__name__} in step 1 with "
            f"the default options: {error}"
        ) from error
    if len(advanced) != len(start):
        raise ValueError(
            f"rule {rule.name!r}: advance returns {len(advanced)} scalar states; the rule has "
            f"{len(start)}"
        )
    return found


def _named_options(rule: Rule) -> dict[str, Option]:
    """The options of a rule, with ``lr`` and ``weight_decay``, by name.

    Raises:
        TypeError: a default is not a number, a boolean or a tuple of numbers.
        ValueError: a name is not an identifier.
    """
    assert rule.options is not None
    given = {"lr": 1e-3, **rule.options}
    given.setdefault("weight_decay", 0.0)
    for name in (rule.name, *given):
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"names of a rule and its options must be identifiers; got {name!r}")
    return {name: _as_option(rule.name, name, value) for name, value in given.items()}


def _check_triton(rule: Rule, *, own_derive: bool) -> None:
    """Raises ValueError if a rule with an update in Triton lacks another function in Triton."""
    if rule.triton_update is None:
        return
    for part, needed in (("derive", own_derive), ("advance", rule.advance is not keep)):
        if needed and getattr(rule, f"triton_{part}") is None:
            raise ValueError(
                f"rule {rule.name!r} has triton_update and {part}, but no triton_{part}"
            )


def _as_option(rule: str, name: str, value: Any) -> Option:
    """The option of a default, with a check that follows from the default's type."""
    default = value.default if isinstance(value, Option) else value
    check: Callable[[str, Any], None]
    if isinstance(default, bool):
        check = check_flag
    elif is_number(default):
        check = check_real
    elif isinstance(default, tuple) and default and all(map(is_number, default)):
        count = len(default)
        check = lambda name, found: _check_numbers(name, found, count)  # noqa: E731
    else:
        raise TypeError(
            f"the default of {name!r} of rule {rule!r} must be a number, a boolean or a tuple of "
            f"numbers; got {default!r}"
        )
    return value if isinstance(value, Option) else Option(default, check)


def _check_numbers(name: str, value: Any, count: int) -> None:
    """Raises ValueError unless value is a tuple or list of ``count`` finite numbers."""
    for i, number in enumerate(check_tuple(name, value, count)):
        check_real(f"{name}[{i}]", number)


def _numbers(value: Any) -> tuple[float, ...]:
    """The numbers of an option's value."""
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else (float(value),)


# --- checks of a definition ----------------------------------------------------------------------


def check_definition(rule: Rule) -> None:
    """Runs the update of a custom rule on a few numbers.

    Raises:
        TypeError: a part of the rule has the wrong type.
        ValueError: the update returns a wrong number of states, a wrong shape or dtype, or values
            that are not finite at zero; changes its arguments; or an element depends on other
            elements. The message names the rule and the mistake.
    """
    which = f"rule {rule.name!r}"
    _check_slots(rule, which)
    group = defaults_of(rule)
    rule.check(group)
    first = _scalars(rule, group)
    if not all(map(math.isfinite, first)):
        raise ValueError(f"{which}: derive returns {first} in step 1 with the default options")
    for bits, variant in variants_of(rule):
        scalars = [np.float32(x) for x in _scalars(rule, variant)]
        _check_update(rule, variant, scalars, rule.flag_names(bits), which)


def _check_slots(rule: Rule, which: str) -> None:
    """Raises unless the states of a rule are valid."""
    flags = {flag.name for flag in rule.flags}
    keys = [slot.key for slot in rule.slots if isinstance(slot, Slot)]
    if len(keys) != len(rule.slots):
        raise TypeError(f"{which}: slots must be Slot(key, kind) tuples; got {rule.slots!r}")
    names = [*keys, *(scalar.key for scalar in rule.scalar_states)]
    for name in names:
        if names.count(name) > 1 or name in ("step", "ema") or name.endswith("_scale"):
            raise ValueError(f"{which}: the name of the state {name!r} is taken")
    for slot in rule.slots:
        if slot.kind not in KINDS:
            raise ValueError(
                f"{which}: the kind of {slot.key!r} must be one of {KINDS}; got {slot.kind!r}"
            )
        if slot.flag is not None and slot.flag not in flags:
            raise ValueError(
                f"{which}: the state {slot.key!r} needs the unknown flag {slot.flag!r}"
            )
    kinds = [slot.kind for slot in rule.slots]
    if "relative" in kinds and "second" not in kinds:
        raise ValueError(f"{which}: a state of kind 'relative' needs one of kind 'second'")


def _check_update(
    rule: Rule, group: Group, scalars: list[np.float32], flags: Collection[str], which: str
) -> None:
    """Raises unless the update of a variant is element by element, in fp32 and finite at zero."""
    variant = f"{which} with flags {sorted(flags)}" if flags else which

    def run(param: F32, grad: F32, states: States) -> tuple[F32, States]:
        try:
            with np.errstate(all="ignore"):
                found = rule.update(param, grad, states, scalars, flags)
        except Exception as error:  # the user's code can raise anything
            raise ValueError(
                f"{variant}: update raised {type(error).__name__}: {error} (h has {len(scalars)} "
                f"scalars, states has {len(states)} arrays)"
            ) from error
        return _checked(rule, found, param.shape, flags, variant)

    zero = np.zeros(1, np.float32)
    starts = tuple(
        np.full(1, rule.initial_value(slot.key, group), np.float32)
        if not slot.flag or slot.flag in flags
        else None
        for slot in rule.slots
    )
    param, states = run(zero, zero, starts)
    for name, values in zip(("the weight", *rule.keys), (param, *states), strict=True):
        if values is not None and not np.isfinite(values).all():
            raise ValueError(
                f"{variant}: {name} becomes {values[0]} where weight and gradient are 0"
            )
    weights, grads = (a.ravel() for a in np.meshgrid(VALUES, VALUES, indexing="ij"))
    held = tuple(
        None if s is None else np.abs(np.resize(VALUES[::-1], grads.shape)) for s in starts
    )
    arguments = [array for array in (weights, grads, *held) if array is not None]
    copies = [array.copy() for array in arguments]
    whole = run(weights, grads, held)
    if not all(map(np.array_equal, copies, arguments)):
        raise ValueError(f"{variant}: update changes its arguments in place")
    for i in range(len(weights)):
        at = slice(i, i + 1)
        alone = run(weights[at], grads[at], tuple(None if s is None else s[at] for s in held))
        for one, every in zip((alone[0], *alone[1]), (whole[0], *whole[1]), strict=True):
            if one is None or every is None:
                continue
            if not np.array_equal(one, every[at], equal_nan=True):
                raise ValueError(f"{variant}: the update of an element depends on other elements")


def _checked(
    rule: Rule, found: Any, shape: tuple[int, ...], flags: Collection[str], variant: str
) -> tuple[F32, States]:
    """The result of an update; raises unless it has the right form."""
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], (tuple, list)):
        raise ValueError(
            f"{variant}: update must return (param, states); got {type(found).__name__}"
        )
    param, states = found
    if len(states) != len(rule.slots):
        raise ValueError(
            f"{variant}: update returns {len(states)} states; the rule has {len(rule.slots)} "
            f"({', '.join(rule.keys) or 'none'})"
        )
    for slot, values in zip((None, *rule.slots), (param, *states), strict=True):
        name = "the weight" if slot is None else slot.key
        if slot is not None and slot.flag is not None and slot.flag not in flags:
            continue
        if not isinstance(values, np.ndarray) or values.shape != shape:
            raise ValueError(f"{variant}: {name} must be an array of shape {shape}; got {values!r}")
        if values.dtype != np.float32:
            raise ValueError(f"{variant}: {name} is of {values.dtype}; updates compute in float32")
    return param, tuple(states)
