"""The loss as a function of the weights, for whoever asks what it looks like around them."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from ..philox import measure_words
from ..reference import math_dtype
from ..reference_noise import normals_from
from ..shards import is_sharded
from ..undisturbed import evaluating, random_numbers, unchanged_buffers, unwrapped

LossFn = Callable[[Any, Any], Tensor]
Weights = Sequence[Tensor]

T = TypeVar("T")

BLOCKS_AT_ONCE = 1 << 18  # of random words, whose arithmetic takes 100 bytes an entry


class Batch(NamedTuple):
    """Inputs, targets, and how many samples they are."""

    x: Any
    y: Any
    n: int

    def inputs(self) -> Any:
        """A copy of ``x``: what a model writes into its inputs must not be in those of the next evaluation."""
        return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, self.x)

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
        self._around = _Around(model)
        self.n_samples = sum(batch.n for batch in batches)
        self.n_entries = sum(p.numel() for p in self.weights)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.weights[0].device

    def at(self, tensors: Mapping[str, Tensor], function: Callable[[], T]) -> T:
        """``function()``, during which the model has ``tensors`` in place of its parameters and buffers of these names."""
        # What is drawn is the same at every evaluation: else a landscape would be noise.
        with random_numbers(self.seed, self.device):
            found: T = functional_call(self._around, {f"model.{name}": x for name, x in tensors.items()}, (function,))
        return found

    def outputs(self, weights: Weights, batch: Batch) -> Any:
        """The model's answer, with a graph if weights require a gradient."""
        return self.at(self._named(weights), lambda: self.model(batch.inputs()))

    def loss_of(self, weights: Weights, batch: Batch) -> Tensor:
        """The mean loss of a batch, 0-d, with a graph if weights require a gradient.

        Raises:
            TypeError, ValueError: ``loss_fn`` returned something else.
        """
        return self.outputs_and_loss(self._named(weights), batch)[1]

    def outputs_and_loss(self, tensors: Mapping[str, Tensor], batch: Batch) -> tuple[Any, Tensor]:
        """The same with any parameters and buffers in place of the model's own, by their names, and the model's answer."""
        return self.at(tensors, lambda: self._outputs_and_loss(batch))

    def _named(self, weights: Weights) -> dict[str, Tensor]:
        return dict(zip(self.names, weights, strict=True))

    def _outputs_and_loss(self, batch: Batch) -> tuple[Any, Tensor]:
        outputs = self.model(batch.inputs())
        loss = self.loss_fn(outputs, batch.y)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn must return a tensor, got {type(loss).__name__}; return the loss, not its .item()"
            )
        if loss.numel() != 1:
            raise ValueError(f"loss_fn must return the mean loss of a batch, one entry, got shape {tuple(loss.shape)}")
        return outputs, loss.reshape(())

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
        for batch in batches:
            loss, gradients = self.differentiated(leaves, batch)
            for sum_of, g in zip(total, gradients, strict=True):
                sum_of.add_(g, alpha=batch.n / n)
            values.append(loss.detach().double())
        return torch.stack(values).tolist(), total

    def differentiated(
        self, leaves: Weights, batch: Batch, of: Weights | None = None, create_graph: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean loss of a batch and its gradients for ``of``, all leaves if None; zeros where one takes no part.

        Raises:
            ValueError: none takes part.
        """
        # Activation checkpointing calls parts of the model in the backward pass: they must see the same weights.
        with torch.enable_grad():
            return self.at(
                self._named(leaves), lambda: self._differentiated(leaves if of is None else of, batch, create_graph)
            )

    def _differentiated(self, leaves: Weights, batch: Batch, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        _, loss = self._outputs_and_loss(batch)
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the model's parameters that require a gradient: loss_fn must use its first "
                "argument, without .detach() or .item()"
            )
        # A function that is differentiable once says so only to a gradient that requires one itself.
        one = torch.ones_like(loss, requires_grad=create_graph)
        gradients = torch.autograd.grad(loss, list(leaves), one, create_graph=create_graph, materialize_grads=True)
        return loss, [dense(g) for g in gradients]

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


class _Around(nn.Module):
    """Calls a function that calls ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def dense(x: Tensor) -> Tensor:
    """Itself, or what a sparse gradient stands for."""
    return x if x.layout == torch.strided else x.to_dense()


@contextmanager
def problem(model: nn.Module, loss_fn: LossFn, data: Iterable[tuple[Any, Any]], seed: int = 0) -> Iterator[Problem]:
    """In the block, the model is in evaluation mode and its loss a function of its weights.

    Afterwards weights, buffers, ``.grad``, modes and the random numbers of torch, Python, NumPy and a loader are as they were.

    Args:
        model: its parameters that require a gradient are the variables. ``torch.compile`` and data parallel wrappers are
            looked through.
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch. In it the model has the weights that are looked at: a
            penalty on ``model.parameters()`` counts.
        data: pairs ``(x, y)``, tensors or nested tuples, lists and dicts of them. Read once, and kept on the device of the
            weights: of a large loader take a part, ``itertools.islice(loader, 10)``. A batch counts as many samples as the
            first tensor in it has rows.
        seed: 64 bits; of our draws, of the loader's, and of what the model and ``loss_fn`` draw.

    Raises:
        ValueError: no batch, no parameter that requires a gradient, one that has no shape yet, or ``seed`` out of range.
        TypeError: an item is no pair, ``seed`` no integer, or a parameter is complex or sharded (``DTensor``).
    """
    seed = _checked_seed(seed)
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
    if any(map(is_lazy, params)):
        raise ValueError("the model has parameters without a shape: call it once on a batch, so that they get theirs")
    if any(p.is_complex() for p in params):
        raise TypeError("the model has complex parameters: measures take real ones, torch.view_as_real() makes them so")
    with ExitStack() as stack:
        stack.enter_context(_one_way_to_compute(model))
        stack.enter_context(_unmoved_generators(data))
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
    x, y = tree_map(lambda part: _usable(part, device) if isinstance(part, Tensor) else part, tuple(item))
    rows = [part.shape[0] for part in tree_leaves((x, y)) if isinstance(part, Tensor) and part.dim() > 0]
    return Batch(x, y, rows[0] if rows else 1)


def _usable(x: Tensor, device: torch.device) -> Tensor:
    x = x.to(device)
    return x.clone() if x.is_inference() else x  # no graph may keep a tensor of inference mode


def _checked_seed(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {seed!r}") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must have 64 bits, got {seed!r}")
    return number


@contextmanager
def _one_way_to_compute(model: nn.Module) -> Iterator[None]:
    """With a graph or without one, and whatever is around, the model computes the same, and can be differentiated."""
    fused, cached, cudnn = (
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_autocast_cache_enabled(),
        torch.backends.cudnn.enabled,
    )
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which turns gradients on
            stack.enter_context(torch.no_grad())
        try:
            # Fused Transformer layers are for evaluation without a graph, and leave out positions that are padded.
            torch.backends.mha.set_fastpath_enabled(False)
            # It would keep a copy of the weights of every evaluation, until the autocast around us ends.
            torch.set_autocast_cache_enabled(False)
            # In evaluation mode cuDNN's recurrent layers cannot be differentiated, and twice never.
            if any(isinstance(m, nn.RNNBase) for m in model.modules()):
                torch.backends.cudnn.enabled = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            torch.set_autocast_cache_enabled(cached)
            torch.backends.cudnn.enabled = cudnn


@contextmanager
def _unmoved_generators(data: Any) -> Iterator[None]:
    """Python's and NumPy's, which a data set may draw from, and one that a loader has of its own."""
    numpy = sys.modules.get("numpy")
    own = getattr(data, "generator", None)
    state = own.get_state() if isinstance(own, torch.Generator) else None
    before, before_numpy = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(before_numpy)
        if own is not None and state is not None:
            own.set_state(state)
