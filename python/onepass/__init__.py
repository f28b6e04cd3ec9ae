"""onepass: optimizers for PyTorch whose whole step is a single pass over memory."""

from importlib.metadata import version

from . import backends, ops
from .optim import SGD, Adagrad, Adam, AdamW, Lion, Optimizer, RMSprop

__version__ = version("onepass")

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Optimizer",
    "RMSprop",
    "backends",
    "ops",
]
