"""The optimizer classes, one per algorithm."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix, PagedAdEMAMix8bit
from .base import Optimizer
from .bitsandbytes_names import (
    Adagrad8bit,
    Adam8bit,
    AdamW4bit,
    AdamW8bit,
    Lion8bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    RMSprop8bit,
    SGD8bit,
)
from .lion import Lion
from .muon import Muon
from .nadam import NAdam
from .options import Options as Options
from .rmsprop import RMSprop
from .schedulefree import AdamWScheduleFree
from .sgd import SGD

__all__ = [
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWScheduleFree",
    "Lion",
    "Lion8bit",
    "Muon",
    "NAdam",
    "Optimizer",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
]
