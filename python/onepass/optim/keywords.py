"""The table of keywords that every optimizer class takes.

Keywords of parameter groups are rows of :data:`onepass.rules.group_options.GROUP_KEYWORDS`; all
other keywords are rows of this module. :class:`onepass.optim.options.Options` defines the type and
the documentation of each keyword. Defaults, checks and attributes are derived from the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..engine import backends
from ..paging.options import paging_of
from ..rules.group_options import GROUP_KEYWORDS, Keyword, unless_none
from ..rules.option_checks import check_flag, check_number


def _unchanged(value: Any) -> Any:
    """Returns the value; the default of :attr:`StepKeyword.read`."""
    return value


def _unchecked(name: str, value: Any) -> None:
    """Accepts any value."""


@dataclass(frozen=True)
class StepKeyword(Keyword):
    """A keyword of the whole step, which is not allowed in a parameter group.

    Attributes:
        attribute: name of the optimizer's attribute, which may be set between steps; defaults to
            the keyword's name.
        read: converts the keyword's value to the attribute's value; may raise ValueError.
        each_step: whether the attribute is also checked at every step.
    """

    attribute: str = ""
    read: Callable[[Any], Any] = _unchanged
    each_step: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "attribute", self.attribute or self.name)


def _check_differentiable(name: str, value: Any) -> None:
    """Raises ValueError unless the value is False."""
    if value:
        raise ValueError(
            "differentiable must be False, because autograd does not record the step; got "
            f"{value!r}"
        )
    check_flag(name, value)


def _check_norm_type(name: str, value: Any) -> None:
    """Raises ValueError unless the value is 2.0 or math.inf."""
    if value not in (2.0, math.inf):
        raise ValueError(f"{name} must be 2.0 or math.inf; got {value!r}")


def _check_backend(name: str, value: Any) -> None:
    """Raises ValueError unless the value is None or the name of a backend."""
    backends.check_name(value)


TORCH_KEYWORDS = (
    Keyword("foreach", None, unless_none(check_flag)),
    Keyword("fused", None, unless_none(check_flag)),
    Keyword("capturable", False, unless_none(check_flag)),
    Keyword("differentiable", False, unless_none(_check_differentiable)),
)
"""Keywords of torch.optim that change nothing here."""

STEP_KEYWORDS = (
    StepKeyword("max_grad_norm", None, unless_none(check_number), each_step=True),
    StepKeyword("norm_type", 2.0, _check_norm_type, each_step=True),
    StepKeyword("skip_nonfinite", False, check_flag, each_step=True),
    StepKeyword("zero_grads", False, check_flag, each_step=True),
    StepKeyword("telemetry", False, check_flag, attribute="measures"),
    StepKeyword("track_changes", False, check_flag),
    StepKeyword("norm_group", None, _unchecked, read=lambda group: group or None),
    StepKeyword("paged", False, _unchecked, "default_paged", attribute="paging", read=paging_of),
    StepKeyword("backend", None, _check_backend),
)
"""Options of the whole step. ``norm_group`` is checked when the first plan is made."""

KEYWORDS: tuple[Keyword, ...] = (*TORCH_KEYWORDS, *GROUP_KEYWORDS, *STEP_KEYWORDS)
STEP_WIDE = frozenset(keyword.name for keyword in STEP_KEYWORDS)
EACH_STEP = tuple(keyword for keyword in STEP_KEYWORDS if keyword.each_step)


def defaults_of(kind: type) -> dict[str, Any]:
    """The keyword defaults of an optimizer class."""
    return {
        keyword.name: getattr(kind, keyword.class_default)
        if keyword.class_default
        else keyword.default
        for keyword in KEYWORDS
    }
