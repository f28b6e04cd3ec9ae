"""Classes with bitsandbytes' names, which differ from their base class only in the default of
``states`` or ``paged``."""

from __future__ import annotations

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .lion import Lion
from .rmsprop import RMSprop
from .sgd import SGD


class Adam8bit(Adam):
    """:class:`Adam` with the default ``states="mx8"``; states take 2.06 bytes per parameter.

    The class has Adam's L2 penalty. bitsandbytes' Adam8bit has AdamW's decoupled weight decay: pass
    ``decoupled_weight_decay=True`` for that.
    """

    default_states = "mx8"


class AdamW8bit(AdamW):
    """:class:`AdamW` with the default ``states="mx8"``; states take 2.06 bytes per parameter."""

    default_states = "mx8"


class AdamW4bit(AdamW):
    """:class:`AdamW` with the default ``states="mx4"``; states take 1.06 bytes per parameter."""

    default_states = "mx4"


class Lion8bit(Lion):
    """:class:`Lion` with the default ``states="mx8"``; states take 1.03 bytes per parameter."""

    default_states = "mx8"


class SGD8bit(SGD):
    """:class:`SGD` with the default ``states="mx8"``; states take 1.03 bytes per parameter.

    Without momentum there are no states; bitsandbytes' class does not allow that case.
    """

    default_states = "mx8"


class Adagrad8bit(Adagrad):
    """:class:`Adagrad` with the default ``states="mx8"``; states take 1.03 bytes per parameter.

    The class also supports lr_decay and initial_accumulator_value, which bitsandbytes' class lacks.
    """

    default_states = "mx8"


class RMSprop8bit(RMSprop):
    """:class:`RMSprop` with the default ``states="mx8"``; states take 1.03 bytes per parameter.

    Momentum and ``centered`` add 1.03 bytes per parameter each.
    """

    default_states = "mx8"


class PagedAdam(Adam):
    """:class:`Adam` with the default ``paged=True``."""

    default_paged = True


class PagedAdamW(AdamW):
    """:class:`AdamW` with the default ``paged=True``."""

    default_paged = True


class PagedLion(Lion):
    """:class:`Lion` with the default ``paged=True``."""

    default_paged = True


class PagedAdam8bit(Adam8bit):
    """:class:`Adam8bit` with the default ``paged=True``."""

    default_paged = True


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW8bit` with the default ``paged=True``."""

    default_paged = True


class PagedLion8bit(Lion8bit):
    """:class:`Lion8bit` with the default ``paged=True``."""

    default_paged = True
