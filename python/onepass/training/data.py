"""Data loaders for batch, mini-batch and stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .validation import check_count


def loader(
    dataset: Dataset[Any], batch_size: int | None = 32, *, seed: int = 0, **options: Any
) -> DataLoader[Any]:
    """A data loader. The batch size selects the textbook variant of gradient descent.

    ============  ============================  ===============================================
    batch_size    variant                       the gradient of a step
    ============  ============================  ===============================================
    ``None``      batch gradient descent        exact, over all samples; one step per epoch
    ``1``         stochastic gradient descent   of one sample; as many steps as samples
    anything else mini-batch gradient descent   of a few; its noise falls as 1 / sqrt(batch_size)
    ============  ============================  ===============================================

    Samples are reshuffled in every epoch, except for batch gradient descent, where the order does
    not matter.

    Args:
        dataset: a dataset with a length.
        batch_size: samples per step; None for all samples.
        seed: the seed of the sample order; the order depends on nothing else.
        options: further keyword arguments of torch.utils.data.DataLoader.

    Raises:
        ValueError: the dataset is empty, or the batch size is below 1.
        TypeError: the batch size or the seed is not an integer.
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
