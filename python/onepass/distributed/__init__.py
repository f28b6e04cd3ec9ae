"""onepass on torch.distributed: DTensor parameters, norms over ranks, numbers of parameters.

torch.distributed is imported only once a model has been sharded with it.
"""

from .param_ids import number_parameters

__all__ = ["number_parameters"]
