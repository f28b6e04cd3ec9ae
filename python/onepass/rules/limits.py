"""The limits of a rule, for all languages: csrc/generate.py writes them into a C++ header.

They hold Adan (four states), AdEMAMix (seven options of its own) and NAdam (a scalar state).
"""

MAX_FLAGS = 5  # booleans that choose what a kernel computes
MAX_STATES = 4  # tensors of the parameter's size
MAX_SCALAR_STATES = 2  # numbers that a parameter keeps beside its step counter
MAX_OPTIONS = 8  # float64 options of a rule's own
MAX_SCALARS = 12  # fp32 numbers that derive makes of them for the kernel
