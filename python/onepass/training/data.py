"""Batch, mini-batch and stochastic gradient descent: how many samples a step sees."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .validation import check_count


def loader(
    dataset: Dataset[Any], batch_size: int | None = 32, *, seed: int = 0, **options: Any
) -> DataLoader[Any]:
    """A loader whose batch size makes gradient descent what the textbooks distinguish.

    ============  ============================  ===============================================
    batch_size    its name                      the gradient of a step
    ============  ============================  ===============================================
    ``None``      batch gradient descent        exact, over all samples; one step per epoch
    ``1``         stochastic gradient descent   of one sample; as many steps as samples
    anything else mini-batch gradient descent   of a few; its noise falls as 1 / sqrt(batch_size)
    ============  ============================  ===============================================

    Samples are reshuffled in every epoch, but for batch gradient descent, where the order is of no
    account.

    Args:
        dataset: of known length.
        batch_size: samples per step.
        seed: of the order, which depends on nothing else.
        options: of torch.utils.data.DataLoader.

    Raises:
        ValueError: an empty dataset, or a batch size below 1.
        TypeError: a batch size or seed that is not an integer.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if not count:
        raise ValueError("the dataset is empty: a loader needs at least one sample")
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    check_count("seed", seed, 0)
    size = count if batch_size is None else batch_size
    generator = torch.Generator().manual_seed(seed)
    defaults = {"shuffle": batch_size is not None, "generator": generator}
    return DataLoader(dataset, batch_size=size, **{**defaults, **options})
