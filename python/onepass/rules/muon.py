"""Muon: the momentum and the direction; and the rule of an optimizer that mixes Muon and AdamW.

The step of Muon is not elementwise, so it is not one rule. The rule ``muon`` writes the direction
that is orthogonalised, in place of the weight. The rule ``sgd`` then takes the step: it reads the
orthogonalised direction as its gradient (:mod:`onepass.muon`).

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..numerics.arrays import F32, States
from . import adam
from .base import (
    CAUTIOUS_DECAY,
    LR,
    OWN,
    WEIGHT_DECAY,
    Flag,
    Group,
    Numbers,
    Rule,
    Slot,
    StepOf,
    present,
)
from .option_checks import check_choice, check_flag, check_number, check_tuple, check_whole


def update(
    param: F32, grad: F32, states: States, h: Sequence[np.float32], flags: Collection[str]
) -> tuple[F32, States]:
    """The momentum of Muon (Jordan et al. 2024). Returns a direction in place of the weight."""
    _, _, momentum, one_minus_momentum = h
    momentum_buffer = momentum * present(states[0]) + one_minus_momentum * grad
    direction = momentum_buffer
    if "nesterov" in flags:
        direction = momentum * momentum_buffer + one_minus_momentum * grad
    return direction, (momentum_buffer,)


def derive(o: Numbers, step: StepOf) -> tuple[float, ...]:
    """Returns (lr, weight decay, momentum, 1 - momentum), in the order of SGD's scalars.

    The sweep that follows the products reads the first two from the same row.
    """
    momentum = o[OWN]
    return o[LR], o[LR] * o[WEIGHT_DECAY], momentum, 1.0 - momentum


def own(group: Group) -> tuple[float, ...]:
    """Returns (momentum,)."""
    return (float(group["momentum"]),)


ADJUSTMENTS = ("original", "match_rms_adamw")
MAX_NS_STEPS = 99  # the limit of torch.optim.Muon
COEFFICIENTS = ("newton_schulz", "polar_express")


def check(group: Group) -> None:
    """Raises ValueError if an option of a group of matrices is invalid."""
    check_number("momentum", group["momentum"])
    check_flag("nesterov", group["nesterov"])
    check_number("eps", group["eps"])
    check_whole("ns_steps", group["ns_steps"])
    if group["ns_steps"] > MAX_NS_STEPS:
        raise ValueError(f"ns_steps must be at most {MAX_NS_STEPS}; got {group['ns_steps']}")
    check_coefficients(group["ns_coefficients"])
    if group["adjust_lr_fn"] is not None:
        check_choice("adjust_lr_fn", group["adjust_lr_fn"], ADJUSTMENTS)
    check_split(group.get("split"))
    if group.get("flatten") is not None:
        check_flag("flatten", group["flatten"])


def check_coefficients(value: Any) -> None:
    """Raises ValueError unless value is a name, a triple of numbers or a sequence of triples."""
    if isinstance(value, str):
        check_choice("ns_coefficients", value, COEFFICIENTS)
        return
    triples = value if isinstance(value, (tuple, list)) else None
    if triples and not any(isinstance(triple, (tuple, list)) for triple in triples):
        triples = [triples]
    if not triples:
        raise ValueError(
            "ns_coefficients must be a triple of numbers, a list of triples, or one of "
            f"{', '.join(map(repr, COEFFICIENTS))}; got {value!r}"
        )
    for triple in triples:
        for number in check_tuple("ns_coefficients", triple, 3):
            check_number("a coefficient of ns_coefficients", number, least=-1e9)


def check_split(value: Any) -> None:
    """Raises ValueError unless value is None or (number of parts, dimension)."""
    if value is None:
        return
    count, dim = check_tuple("split", value, 2)
    for number in (count, dim):
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"split must be (number of parts, dimension); got {value!r}")
    if count < 1:
        raise ValueError(f"split must have at least one part; got {value!r}")


RULE = Rule(
    "muon",
    flags=(Flag("nesterov"),),
    slots=(Slot("momentum_buffer", "first"),),
    own=own,
    derive=derive,
    scalars=4,
    update=update,
    check=check,
    saves_step=False,
    formats=("fp32", "bf16"),
)


class _MuonOrAdamW(Rule):
    """The rule of :class:`onepass.Muon`, whose groups are stepped by Muon or by AdamW."""

    def of(self, group: Group) -> Rule:
        """See :meth:`Rule.of`."""
        return RULE if uses_muon(group) else adam.RULE

    def flag_bits(self, group: Group) -> int:
        """See :meth:`Rule.flag_bits`."""
        return self.of(group).flag_bits(group)


def uses_muon(group: Group) -> bool:
    """Whether the parameters of a group are orthogonalised; AdamW steps other groups."""
    return bool(group.get("use_muon", True))


def _check_group(group: Group) -> None:
    """Raises ValueError if an option of a group is invalid for the rule that steps the group."""
    check_flag("use_muon", group.get("use_muon", True))
    (RULE if uses_muon(group) else adam.RULE).check(group)


MIXED = _MuonOrAdamW(
    "muon_or_adamw",
    # Of AdamW, and of the rule that steps the matrices (onepass.muon.device_plan).
    flags=(CAUTIOUS_DECAY,),
    slots=(*RULE.slots, *adam.RULE.slots),
    update=update,
    check=_check_group,
    saves_step=False,
    formats=RULE.formats,
    laid_out_by=("split", "flatten", "cautious_weight_decay"),
)
