"""Which samples of a data set a sweep is over, and batches of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import TensorDataset, default_collate

from .undisturbed import random_numbers


class DrawnSamples:
    """At most ``n`` samples of a data set, drawn once without replacement; each has a seed for its random numbers.

    ``dataset``: has a length and items ``(x, y)``; or a pair of tensors.

    Raises:
        TypeError: it has no length or no items.
        ValueError: it is empty, or its tensors are not equally long.

    >>> samples = samkern.samples.DrawnSamples((torch.arange(5.0), torch.arange(5)), n=3, seed=0)
    >>> len(samples), samples.batch(range(2), torch.device("cpu"))[0].shape
    (3, torch.Size([2]))
    """

    def __init__(self, dataset: Any, n: int, seed: int) -> None:
        self.dataset = _with_items(dataset)
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(self.dataset), generator=generator, device="cpu")
        self.indices: list[int] = order[:n].tolist()
        # One for each sample, so that its random numbers do not depend on which samples came before.
        self.seeds: list[int] = torch.randint(2**62, (len(self),), generator=generator, device="cpu").tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: range, device: torch.device) -> tuple[Any, Any]:
        """``(x, y)`` of the samples at these places of the draw, put together as by a ``DataLoader``, on ``device``.

        Raises:
            ValueError: an item is not a pair.
        """
        items = []
        for position in positions:
            index = self.indices[position]
            with random_numbers(self.seeds[position], device):
                item = self.dataset[index]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise ValueError(f"item {index} of the data set must be a pair (x, y), got {type(item).__name__}")
            items.append(tuple(item))
        x, y = tree_map(
            lambda part: part.to(device, non_blocking=True) if isinstance(part, Tensor) else part,
            default_collate(items),
        )
        return x, y


def _with_items(dataset: Any) -> Any:
    if isinstance(dataset, (tuple, list)) and len(dataset) == 2 and all(isinstance(part, Tensor) for part in dataset):
        xs, ys = dataset
        if len(xs) != len(ys):
            raise ValueError(f"dataset has {len(xs)} inputs and {len(ys)} targets; they must be equally many")
        dataset = TensorDataset(xs, ys)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"dataset must have a length and items, got {type(dataset).__name__}; give fisher_diagonal an iterable of "
            "losses instead"
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty: at least one sample is needed")
    return dataset
