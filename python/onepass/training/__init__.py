"""A short, readable training loop and its parts: parameter groups, schedules and data loaders.

``import onepass.training`` loads this package; no other part of onepass depends on it.
"""

from .data import loader
from .groups import decay_groups
from .optimizers import OPTIMIZERS, make_optimizer
from .schedules import SCHEDULES, schedule
from .trainer import Trainer

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Trainer",
    "decay_groups",
    "loader",
    "make_optimizer",
    "schedule",
]
