"""The loss as a function of the weights, for whoever asks what it looks like around them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from ..philox import measure_words
from ..reference import math_dtype
from ..reference_noise import normals_from
from ..shards import is_sharded
from ..undisturbed import evaluating, random_numbers, unchanged_buffers, unwrapped

LossFn = Callable[[Any, Any], Tensor]
Weights = Sequence[Tensor]

BLOCKS_AT_ONCE = 1 << 18  # of random words, whose arithmetic takes 100 bytes an entry


class Batch(NamedTuple):
    """Inputs, targets, and how many samples they are."""

    x: Any
    y: Any
    n: int

    def part(self, begin: int, end: int) -> Batch:
        """Samples ``begin`` to ``end - 1``: these rows of all tensors that have a row for each sample."""
        rows = slice(begin, end)
        x, y = tree_map(lambda part: part[rows] if self.has_rows(part) else part, (self.x, self.y))
        return Batch(x, y, len(range(self.n)[rows]))

    def has_rows(self, part: Any) -> bool:
        """Whether it is a tensor with a row for each sample."""
        return isinstance(part, Tensor) and part.dim() > 0 and part.shape[0] == self.n


class Problem:
    """The mean loss over a fixed list of batches, as a function of the weights.

    The model's own weights are read and never written: losses are computed on lists of tensors in their place. Sums over
    batches are weighted by their samples and added in float64. Made by ``problem()``.

    ``names``, ``weights``: the parameters that require a gradient, the latter detached. ``batches``: on their device.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, batches: Sequence[Batch], seed: int) -> None:
        own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in own]
        self.weights = [p.detach() for _, p in own]
        self.model, self.loss_fn, self.batches, self.seed = model, loss_fn, batches, seed
        self.n_samples = sum(batch.n for batch in batches)
        self.n_entries = sum(p.numel() for p in self.weights)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.weights[0].device

    def outputs(self, weights: Weights, batch: Batch) -> Any:
        """The model's answer, with a graph if weights require a gradient."""
        # What a model draws is the same at every evaluation: else a landscape would be noise.
        with random_numbers(self.seed, self.device):
            return functional_call(self.model, dict(zip(self.names, weights, strict=True)), (batch.x,))

    def loss_of(self, weights: Weights, batch: Batch) -> Tensor:
        """The mean loss of a batch, 0-d, with a graph if weights require a gradient.

        Raises:
            TypeError, ValueError: ``loss_fn`` returned something else.
        """
        loss = self.loss_fn(self.outputs(weights, batch), batch.y)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn must return a tensor, got {type(loss).__name__}; return the loss, not its .item()"
            )
        if loss.numel() != 1:
            raise ValueError(f"loss_fn must return the mean loss of a batch, one entry, got shape {tuple(loss.shape)}")
        return loss.reshape(())

    def losses(self, weights: Weights | None = None, batches: Sequence[Batch] | None = None) -> list[float]:
        """The mean loss of each batch, without a graph."""
        weights = self.weights if weights is None else weights
        with torch.no_grad():
            found = [self.loss_of(weights, batch).double() for batch in (self.batches if batches is None else batches)]
        values: list[float] = torch.stack(found).tolist()  # read from the device at once
        return values

    def loss(self, weights: Weights | None = None, batches: Sequence[Batch] | None = None) -> float:
        """Their mean over samples."""
        batches = self.batches if batches is None else batches
        return self.mean_over(self.losses(weights, batches), batches)

    @staticmethod
    def mean_over(values: Sequence[float], batches: Sequence[Batch]) -> float:
        """The mean over samples of what is a mean over each batch."""
        return sum(v * batch.n for v, batch in zip(values, batches, strict=True)) / sum(batch.n for batch in batches)

    def gradient(
        self, weights: Weights | None = None, batches: Sequence[Batch] | None = None
    ) -> tuple[float, list[Tensor]]:
        """The mean loss and its gradient, float32, or float64 for float64 weights; ``.grad`` is not touched.

        Raises:
            ValueError: the loss does not depend on the weights.
        """
        batches = self.batches if batches is None else batches
        values, total = self.losses_and_gradient(weights, batches)
        return self.mean_over(values, batches), total

    def losses_and_gradient(
        self, weights: Weights | None = None, batches: Sequence[Batch] | None = None
    ) -> tuple[list[float], list[Tensor]]:
        """The same, with the mean loss of each batch."""
        batches = self.batches if batches is None else batches
        leaves = self.leaves(weights)
        total, n = [torch.zeros_like(w, dtype=math_dtype(w.dtype)) for w in leaves], sum(batch.n for batch in batches)
        values = []
        with torch.enable_grad():
            for batch in batches:
                loss = self.loss_of(leaves, batch)
                for sum_of, g in zip(total, self.differentiated(loss, leaves), strict=True):
                    sum_of.add_(g if g.layout == torch.strided else g.to_dense(), alpha=batch.n / n)
                values.append(loss.detach().double())
        return torch.stack(values).tolist(), total

    def differentiated(self, loss: Tensor, leaves: Weights, create_graph: bool = False) -> tuple[Tensor, ...]:
        """Gradients of ``loss``, zeros where a weight takes no part.

        Raises:
            ValueError: none takes part.
        """
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the model's parameters that require a gradient: loss_fn must use its first "
                "argument, without .detach() or .item()"
            )
        return torch.autograd.grad(loss, list(leaves), create_graph=create_graph, materialize_grads=True)

    def leaves(self, weights: Weights | None = None) -> list[Tensor]:
        """The weights as places to differentiate at: nothing is copied."""
        return [w.detach().requires_grad_() for w in (self.weights if weights is None else weights)]

    def normals(self, draw: int) -> list[Tensor]:
        """Standard normal numbers for every entry: Philox words of seed, draw and place, the same on every device."""
        return self._drawn(draw, normals_from)

    def signs(self, draw: int) -> list[Tensor]:
        """-1 or 1 for every entry, equally likely (Rademacher), from the same words."""
        return self._drawn(draw, lambda word: 1 - 2 * (word >> 31).flatten().float())

    def uniform(self, draw: int) -> float:
        """A number in (0, 1), of the block after those of all entries."""
        q = torch.tensor([(self.n_entries + 3) // 4])
        return (measure_words(q, draw, self.seed)[0, 0].item() + 0.5) * 2.0**-32

    def _drawn(self, draw: int, made_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        blocks = torch.arange((self.n_entries + 3) // 4, dtype=torch.int64, device=self.device)
        numbers = torch.cat([made_of(measure_words(q, draw, self.seed)) for q in torch.split(blocks, BLOCKS_AT_ONCE)])
        parts = torch.split(numbers[: self.n_entries], [w.numel() for w in self.weights])
        # In the weight's memory format and dtype.
        return [torch.empty_like(w).copy_(part.view(w.shape)) for w, part in zip(self.weights, parts, strict=True)]


@contextmanager
def problem(model: nn.Module, loss_fn: LossFn, data: Iterable[tuple[Any, Any]], seed: int = 0) -> Iterator[Problem]:
    """In the block, the model is in evaluation mode and its loss a function of its weights.

    Afterwards weights, buffers, ``.grad``, modes and the random numbers of torch, Python and NumPy are as they were.

    Args:
        model: its parameters that require a gradient are the variables. ``torch.compile`` and data parallel wrappers are
            looked through.
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch.
        data: pairs ``(x, y)``, tensors or nested tuples, lists and dicts of them. Read once, and kept on the device of the
            weights: of a large loader take a part, ``itertools.islice(loader, 10)``. A batch counts as many samples as the
            first tensor in it has rows.
        seed: 64 bits; of our draws, of the loader's, and of what the model draws.

    Raises:
        ValueError: no batch, or no parameter that requires a gradient.
        TypeError: an item is no pair, or a parameter is sharded (``DTensor``).
    """
    model = unwrapped(model)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            "the model has no parameter that requires a gradient: call requires_grad_() on those to look at"
        )
    if any(map(is_sharded, params)):
        raise TypeError(
            "the model's parameters are sharded (DTensor), measures need whole ones: load a full state_dict into a model "
            "that is not sharded"
        )
    with ExitStack() as stack:
        stack.enter_context(_unmoved_generators())
        stack.enter_context(random_numbers(seed, params[0].device))
        read = [_batch(item, params[0].device) for item in data]
        batches = [batch for batch in read if batch.n > 0]  # the mean loss of no sample is NaN
        if not batches:
            raise ValueError("data is empty: give at least one batch (x, y); an iterator can be read only once")
        stack.enter_context(evaluating(model))
        stack.enter_context(unchanged_buffers(model))
        yield Problem(model, loss_fn, batches, seed)


def _batch(item: Any, device: torch.device) -> Batch:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"data must yield pairs (x, y), got {type(item).__name__}: wrap the loader in a generator of pairs"
        )
    x, y = tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, tuple(item))
    rows = [part.shape[0] for part in tree_leaves((x, y)) if isinstance(part, Tensor) and part.dim() > 0]
    return Batch(x, y, rows[0] if rows else 1)


@contextmanager
def _unmoved_generators() -> Iterator[None]:
    """Python's and NumPy's, which a data set may draw from."""
    numpy = sys.modules.get("numpy")
    before, before_numpy = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(before_numpy)
