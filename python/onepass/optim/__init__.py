"""The optimizer classes: thin, one per algorithm."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .base import Optimizer, Options
from .lion import Lion
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "Optimizer", "Options", "RMSprop"]
