"""Memory use of a training run with each optimizer: prediction, measurement and timeline.

    fit = onepass.memory.fits("llama-3-8b", "adamw8bit", device="H100", mesh="fsdp=8")

    report = onepass.memory.profile(optimizer, model)

    with onepass.memory.track(model, optimizer) as timeline:
        ...  # any training code
    timeline.plot("memory.png")

See docs/memory.md. The command-line interface is ``onepass memory``.
"""

from .activations import Sample
from .fitting import Fit, fits
from .profiling import profile
from .report import Bytes, MemoryReport
from .timeline import Timeline, track

__all__ = ["Bytes", "Fit", "MemoryReport", "Sample", "Timeline", "fits", "profile", "track"]
