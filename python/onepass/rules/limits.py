"""The size limits of a rule in all languages; csrc/generate.py writes them into a C++ header.

The limits are large enough for Adan (four states), AdEMAMix (nine options of its own) and NAdam
(one scalar state).
"""

MAX_FLAGS = 5  # booleans that select a variant of the update in a kernel
MAX_STATES = 4  # tensors of the parameter's size
MAX_SCALAR_STATES = 2  # numbers that a parameter stores beside its step counter
MAX_OPTIONS = 9  # float64 options of a rule's own
MAX_SCALARS = 12  # fp32 numbers that derive computes from the options for the kernel
