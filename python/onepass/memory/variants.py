"""onepass optimizers by their command-line names: ``adamw``, ``lion8bit``, ``adamw+mx8+split8``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import optim
from ..formats import STATE_FORMATS, WEIGHT_FORMATS
from ..optim.registry import classes
from ..suggestions import did_you_mean
from .models import load
from .models.shapes import EMBEDDING, NORM

Groups = list[dict[str, Any]]

_OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "centered": {"centered": True},
    "amsgrad": {"amsgrad": True},
    "ema": {"ema_decay": 0.999},
    "paged": {"paged": True},
}
WORDS = (*STATE_FORMATS, *WEIGHT_FORMATS, *_OPTIONS, "paged=SIZE")
"""The words that may follow a name and a plus sign."""


@dataclass(frozen=True)
class Variant:
    """A onepass optimizer with its options.

    Attributes:
        name: the name as written on the command line.
        made: the optimizer class.
        options: keyword arguments of the class.
    """

    name: str
    made: type[optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def states(self) -> str:
        """The format of the states."""
        return str(self.options.get("states") or self.made.default_states)

    @property
    def weights(self) -> str:
        """The format of the weights."""
        return str(self.options.get("weights", "native"))

    @property
    def paged(self) -> bool:
        """Whether states are paged."""
        return self.options.get("paged", self.made.default_paged) is not False

    def plus(self, *words: str) -> Variant:
        """A copy with further options, each given by its command-line word."""
        found = self
        for word in words:
            found = replace(
                found,
                name=f"{found.name}+{word}",
                options={**found.options, **_option(word, found.name)},
            )
        return found

    def make(self, params: Any) -> optim.Optimizer:
        """Makes the optimizer over parameters or groups.

        Raises:
            ValueError: the class does not accept one of the options.
        """
        unknown = self.options.keys() - inspect.signature(self.made).parameters.keys()
        if unknown:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"{self.name}: {self.made.__name__} has no {names}")
        try:
            return self.made(params, **self.options)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def parse(text: str) -> Variant | None:
    """The variant with a command-line name; None if its first word is not a onepass class.

    The first word is the name of a class of onepass in any case, or ``module:Class`` for a class of
    a custom rule.

    Raises:
        ValueError: a word after a plus is unknown (the message lists the known words), or the
            options are invalid for the class.
    """
    name, *words = text.split("+")
    words = [word.lower() for word in words]
    if ":" in name:
        made = optimizer_class(load(name))
    else:
        name = name.lower()
        made = classes().get(name)
    if made is None:
        return None
    variant = Variant(name, made).plus(*words)
    variant.make([torch.nn.Parameter(torch.empty(1, 1, device="meta", dtype=torch.bfloat16))])
    return replace(variant, name="+".join([name, *words]))


def optimizer_class(found: Any) -> type[optim.Optimizer] | None:
    """The object if it is an optimizer class of onepass or of a custom rule, else None."""
    if not isinstance(found, type) or not issubclass(found, optim.Optimizer):
        return None
    return found if hasattr(found, "rule") else None


def _option(word: str, name: str) -> dict[str, Any]:
    if word in STATE_FORMATS:
        return {"states": word}
    if word in WEIGHT_FORMATS:
        return {"weights": word}
    if word in _OPTIONS:
        return _OPTIONS[word]
    if word.startswith("paged="):
        from .sizes import parse_size

        return {"paged": parse_size(word.removeprefix("paged="))}
    meant = did_you_mean(word, WORDS) or "."
    raise ValueError(f"{name}+{word}: no option {word!r}{meant} The options are {', '.join(WORDS)}")


def groups_of(
    params: Sequence[torch.nn.Parameter],
    kinds: Sequence[str],
    careful: bool,
    matrices: bool = False,
) -> list[torch.nn.Parameter] | Groups:
    """Parameter groups for an optimizer, without frozen parameters.

    Args:
        params: the parameters of the model.
        kinds: the kind of each parameter.
        careful: make groups like onepass.parameter_groups, with fp32 states for embeddings and
            norms, and the native format for fp32 weights.
        matrices: make groups like onepass.muon_groups, with ``use_muon=False`` for everything but
            matrices and convolutions.
    """
    trained = [(p, kind) for p, kind in zip(params, kinds, strict=True) if p.requires_grad]
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for param, kind in trained:
        rest = matrices and (param.dim() < 2 or kind in (EMBEDDING, NORM))
        native = careful and param.dtype == torch.float32
        wide = careful and kind in (EMBEDDING, NORM)
        options: dict[str, Any] = {"weights": "native"} if native else {}
        options |= {"states": "fp32"} if wide else {}
        options |= {"use_muon": False} if rest else {}
        groups.setdefault((native, wide, rest), {"params": [], **options})["params"].append(param)
    return list(groups.values())
