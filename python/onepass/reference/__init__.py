"""The specification of every format and rule, in NumPy.

The other backends return the same bits as this package: all arithmetic in fp32, round to nearest
even, denormals kept, in the order written here, with a correctly rounded root and division (NumPy's
are) and no fused multiply-add. Two NaNs count as the same bits. How to add a rule or a format:
CONTRIBUTING.md.
"""

from .arrays import F32, U8, U16, U32, States
from .floats import (
    decode_bf16,
    decode_fp16,
    encode_bf16,
    encode_bf16_stochastic,
    encode_fp16,
    encode_fp16_stochastic,
)
from .formats import decode_states, decode_weight, encode_states, encode_weight
from .norm import norm
from .random import random_bits, splitmix64
from .rules import Update, adagrad, adam, lion, rmsprop, sgd

__all__ = [
    "F32",
    "U8",
    "U16",
    "U32",
    "States",
    "Update",
    "adagrad",
    "adam",
    "decode_bf16",
    "decode_fp16",
    "decode_states",
    "decode_weight",
    "encode_bf16",
    "encode_bf16_stochastic",
    "encode_fp16",
    "encode_fp16_stochastic",
    "encode_states",
    "encode_weight",
    "lion",
    "norm",
    "random_bits",
    "rmsprop",
    "sgd",
    "splitmix64",
]
