"""What a training run takes of memory with each optimizer: predicted, measured, followed.

    report = onepass.memory.profile(optimizer, model)

    with onepass.memory.track(model, optimizer) as timeline:
        ...  # any training code
    timeline.plot("memory.png")

See docs/memory.md; on the command line ``onepass memory``.
"""

from .profiling import profile
from .report import Bytes, MemoryReport
from .timeline import Timeline, track

__all__ = ["Bytes", "MemoryReport", "Timeline", "profile", "track"]
