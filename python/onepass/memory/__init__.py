"""Memory use of a training run with each optimizer: prediction, measurement and timeline.

    report = onepass.memory.profile(optimizer, model)

    with onepass.memory.track(model, optimizer) as timeline:
        ...  # any training code
    timeline.plot("memory.png")

See docs/memory.md. The command-line interface is ``onepass memory``.
"""

from .profiling import profile
from .report import Bytes, MemoryReport
from .timeline import Timeline, track

__all__ = ["Bytes", "MemoryReport", "Timeline", "profile", "track"]
