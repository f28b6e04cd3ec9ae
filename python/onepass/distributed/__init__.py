"""Support for torch.distributed: DTensor parameters, norms over ranks, parameter numbers.

These modules do not import torch.distributed unless a model uses it.
"""

from .param_ids import number_parameters

__all__ = ["number_parameters"]
