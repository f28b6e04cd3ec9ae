"""Patches that keep the weights of a server equal to those of a trainer.

``take_delta`` takes the weights that an optimizer with ``track_changes=True`` has changed,
``apply_delta`` writes them on the server. docs/weight-sync.md describes the protocol.
"""

from .applying import apply_delta
from .delta import Change, Delta
from .files import load_delta, save_delta
from .merging import merge_deltas
from .taking import mark_changed, take_delta

__all__ = [
    "Change",
    "Delta",
    "apply_delta",
    "load_delta",
    "mark_changed",
    "merge_deltas",
    "save_delta",
    "take_delta",
]
