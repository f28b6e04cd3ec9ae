"""onepass: optimizers for PyTorch whose whole step is a single pass over memory."""

from importlib.metadata import PackageNotFoundError, version

from . import backends, memory, ops
from .amp import GradScaler
from .bitsandbytes import from_bitsandbytes, to_bitsandbytes
from .checkpoints import convert_state_dict, full_precision_state_dict
from .distributed import number_parameters
from .optim import (
    SGD,
    Adagrad,
    Adagrad8bit,
    Adam,
    Adam8bit,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    Lion,
    Lion8bit,
    Optimizer,
    PagedAdam,
    PagedAdam8bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    RMSprop,
    RMSprop8bit,
    SGD8bit,
)
from .precision import EMBEDDINGS, NORMS, cast_model, parameter_groups
from .release import release_gradients

try:
    __version__ = version("onepass")
except PackageNotFoundError:  # run from the sources, as bench/gpu.sh does
    __version__ = "0+source"

__all__ = [
    "EMBEDDINGS",
    "NORMS",
    "SGD",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "GradScaler",
    "Lion",
    "Lion8bit",
    "Optimizer",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
    "backends",
    "cast_model",
    "convert_state_dict",
    "from_bitsandbytes",
    "full_precision_state_dict",
    "memory",
    "number_parameters",
    "ops",
    "parameter_groups",
    "release_gradients",
    "to_bitsandbytes",
]
