"""The compared algorithms, in order, with their learning rates and line styles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """An optimizer of :func:`onepass.training.make_optimizer` and its line style.

    Attributes:
        key: the name in results and file names.
        label: the name in plots and tables.
        colour: the colour in plots.
        line: the matplotlib line style.
        rates: name of a task -> the centre of the learning-rate sweep.
        decay: the weight decay in training, decoupled if the class has decoupled decay by default,
            else added to the gradient.
        options: optimizer options besides learning rate and decay.
        training: arguments of the Trainer that replace those of all algorithms.
        optimizer: the name for make_optimizer; empty if it is the key.
    """

    key: str
    label: str
    colour: str
    line: Any
    rates: dict[str, float]
    decay: float
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: str = ""

    @property
    def name(self) -> str:
        """The name for make_optimizer."""
        return self.optimizer or self.key


BETAS = {"betas": (0.9, 0.999)}  # the variants of Adam and AdamW must differ in one thing only
# The colour-blind-safe palette of Okabe and Ito, without yellow, which is too pale on white. Lines
# also differ in their dashes. Four algorithms have the colour of a related one.
ALGORITHMS = (
    Algorithm("sgd", "SGD", "#999999", "-", {"CNN": 1.0, "transformer": 1.0}, 1e-4),
    Algorithm(
        "momentum", "SGD, momentum 0.9", "#0072B2", "-", {"CNN": 0.1, "transformer": 0.3}, 1e-4
    ),
    Algorithm(
        "nesterov", "Nesterov 0.9", "#56B4E9", (0, (6, 2)), {"CNN": 0.1, "transformer": 0.3}, 1e-4
    ),
    Algorithm("adagrad", "Adagrad", "#009E73", "-", {"CNN": 0.1, "transformer": 0.03}, 1e-4),
    Algorithm("rmsprop", "RMSprop", "#CC79A7", "-", {"CNN": 1e-2, "transformer": 1e-3}, 1e-4),
    Algorithm(
        "adam", "Adam", "#E69F00", (0, (4, 1.5)), {"CNN": 1e-2, "transformer": 3e-3}, 1e-4, BETAS
    ),
    Algorithm("adamw", "AdamW", "#000000", "-", {"CNN": 1e-2, "transformer": 3e-3}, 1e-2, BETAS),
    Algorithm("lion", "Lion", "#D55E00", (0, (1, 1.2)), {"CNN": 3e-3, "transformer": 1e-3}, 1e-2),
    Algorithm(
        "cautious",
        "AdamW, cautious",
        "#000000",
        (0, (1, 1.2)),
        {"CNN": 1e-2, "transformer": 3e-3},
        1e-2,
        {**BETAS, "cautious_weight_decay": True},
        optimizer="adamw",
    ),
    Algorithm("nadam", "NAdam", "#E69F00", (0, (1, 1.2)), {"CNN": 1e-2, "transformer": 3e-3}, 1e-4),
    Algorithm(
        "ademamix", "AdEMAMix", "#009E73", (0, (4, 1.5)), {"CNN": 1e-2, "transformer": 3e-3}, 1e-2
    ),
    Algorithm(
        "adamwschedulefree",
        "AdamW, schedule-free",
        "#CC79A7",
        (0, (4, 1.5)),
        {"CNN": 1e-2, "transformer": 1e-2},
        1e-2,
        training={"schedule": "constant"},
    ),
)
BY_KEY = {algorithm.key: algorithm for algorithm in ALGORITHMS}
