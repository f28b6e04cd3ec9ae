"""The coefficients of the Newton-Schulz iteration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Triple = tuple[float, float, float]
"""The coefficients (a, b, c) of the polynomial a x + b x^3 + c x^5 of one iteration."""

NEWTON_SCHULZ: Triple = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024; the default of torch.optim.Muon. Singular values end between 0.7 and 1.2."""

_MARGIN = 1.01
# Amsel et al., "The Polar Express: optimal matrix sign methods and their application to the Muon
# algorithm" (2025), algorithm 1. Every polynomial but the last is applied to x / 1.01, so that
# rounding errors do not leave the interval on which the polynomials converge. The first one is
# divided twice, because the paper also divides by 1.01 times the norm.
_PUBLISHED: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def _of_smaller(triple: Triple, factor: float) -> Triple:
    """The coefficients of the polynomial of x / factor."""
    a, b, c = triple
    return a / factor, b / factor**3, c / factor**5


POLAR_EXPRESS: tuple[Triple, ...] = (
    _of_smaller(_PUBLISHED[0], _MARGIN**2),
    *(_of_smaller(triple, _MARGIN) for triple in _PUBLISHED[1:-1]),
    _PUBLISHED[-1],
)
"""One triple for each iteration; the last one repeats. Singular values end near 1."""

_NAMED = {"newton_schulz": (NEWTON_SCHULZ,), "polar_express": POLAR_EXPRESS}


def triples_of(group: Mapping[str, Any]) -> list[Triple]:
    """The coefficients of each iteration of a group.

    A single triple is used in every iteration. If a list is shorter than ``ns_steps``, its last
    triple is repeated; if it is longer, the rest is not used.
    """
    given, steps = group["ns_coefficients"], int(group["ns_steps"])
    if isinstance(given, str):
        listed = list(_NAMED[given])
    elif isinstance(given[0], (tuple, list)):
        listed = [(float(a), float(b), float(c)) for a, b, c in given]
    else:
        a, b, c = map(float, given)
        listed = [(a, b, c)]
    return [listed[min(i, len(listed) - 1)] for i in range(steps)]


def lr_ratio(adjust_lr_fn: str | None, rows: int, cols: int) -> float:
    """The factor by which ``adjust_lr_fn`` multiplies the learning rate of a matrix."""
    if adjust_lr_fn == "match_rms_adamw":
        return float(0.2 * max(rows, cols) ** 0.5)
    return float(max(1.0, rows / cols) ** 0.5)
