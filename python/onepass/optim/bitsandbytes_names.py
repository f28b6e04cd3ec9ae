"""The names of bitsandbytes: the classes with another default for ``states`` or ``paged``, nothing
else."""

from __future__ import annotations

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .lion import Lion
from .rmsprop import RMSprop
from .sgd import SGD


class Adam8bit(Adam):
    """:class:`Adam` with ``states="mx8"`` unless given: its arguments; 2.06 bytes a parameter.

    bitsandbytes' class of this name decays weights as AdamW does; this one is Adam:
    ``decoupled_weight_decay=True`` for the other.
    """

    default_states = "mx8"


class AdamW8bit(AdamW):
    """:class:`AdamW` with ``states="mx8"`` unless given: its arguments; 2.06 bytes a parameter."""

    default_states = "mx8"


class AdamW4bit(AdamW):
    """:class:`AdamW` with ``states="mx4"`` unless given: its arguments; 1.06 bytes a parameter."""

    default_states = "mx4"


class Lion8bit(Lion):
    """:class:`Lion` with ``states="mx8"`` unless given: its arguments; 1.03 bytes a parameter."""

    default_states = "mx8"


class SGD8bit(SGD):
    """:class:`SGD` with ``states="mx8"`` unless given: its arguments; 1.03 bytes a parameter.

    Without momentum there is no state to store, and this is SGD (bitsandbytes' class refuses that).
    """

    default_states = "mx8"


class Adagrad8bit(Adagrad):
    """:class:`Adagrad` with ``states="mx8"`` unless given: its arguments; 1.03 bytes a parameter.

    (bitsandbytes' class takes neither lr_decay nor initial_accumulator_value; this one does.)
    """

    default_states = "mx8"


class RMSprop8bit(RMSprop):
    """:class:`RMSprop` with ``states="mx8"`` unless given: its arguments; 1.03 bytes a parameter
    and as much again with momentum, and when centered."""

    default_states = "mx8"


class PagedAdam(Adam):
    """:class:`Adam` with ``paged=True`` unless given: its arguments."""

    default_paged = True


class PagedAdamW(AdamW):
    """:class:`AdamW` with ``paged=True`` unless given: its arguments."""

    default_paged = True


class PagedLion(Lion):
    """:class:`Lion` with ``paged=True`` unless given: its arguments."""

    default_paged = True


class PagedAdam8bit(Adam8bit):
    """:class:`Adam8bit` with ``paged=True`` unless given: its arguments."""

    default_paged = True


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW8bit` with ``paged=True`` unless given: its arguments."""

    default_paged = True


class PagedLion8bit(Lion8bit):
    """:class:`Lion8bit` with ``paged=True`` unless given: its arguments."""

    default_paged = True
