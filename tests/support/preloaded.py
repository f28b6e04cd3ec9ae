"""The imports of the processes that tests start; :mod:`tests.support.processes` forks after them.

The module also exempts everything imported from garbage collection, as the fixtures do.
"""

import gc
import importlib

# torch.optim imports the first when it makes an optimizer, torch's checkpoints the last.
for _name in (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "onepass.optim",
    "onepass.training",
    "tests.random_ranks",
    "tests.zero_checks",
    "tests.zero_checkpoints",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()
