"""A training loop that can be read in one sitting, and its parts: groups, schedules, loaders.

``import onepass.training`` brings them; nothing in onepass needs them.
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
