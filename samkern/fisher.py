"""The diagonal of the empirical Fisher matrix, from losses of single samples.

``F = (1/N) sum_j (grad l_j)^2``, where ``l_j`` is the loss of one sample with its true label. The square of the gradient of
a batch is something else: gradients of samples that point in opposite directions cancel there, and add up here. So every
sample needs a gradient of its own.

>>> model, loss_fn = torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy
>>> data = torch.randn(100, 3), torch.randint(0, 2, (100,))
>>> losses = samkern.fisher.SampleLosses(model, loss_fn, data, num_samples=64)
>>> squares, n_used, n_left_out = samkern.fisher.fisher_diagonal(list(model.parameters()), losses)
>>> [tuple(x.shape) for x in squares], n_used.item()
([(2, 3), (2,)], 64)

While samples are computed, normalisation layers are in evaluation mode: a batch of one would ruin their statistics. At all
other times, also between two chunks of samples and after an exception, the model is as it was.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from . import ops
from .progress import progress_bar
from .reference import math_dtype
from .samples import DrawnSamples
from .shards import in_place_of, is_sharded, row_major_zeros
from .tensors import check_parameters
from .undisturbed import random_numbers, undisturbed, unwrapped

Gradients = list[Tensor | None]
Samples = Generator[Sequence[Tensor | None], None, None]


class SampleLosses:
    """Losses of single samples of a data set, drawn once: the same in every sweep and on every rank.

    Args:
        model: what ``loss_fn`` judges. Data parallel wrappers and ``torch.compile`` are looked through.
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch; it is called with batches of one sample. Parameters of
            its own, if it is a module, have gradients too.
        dataset: has a length and items ``(x, y)``; or a pair of tensors ``(xs, ys)``. Items become batches as in a
            ``DataLoader`` and move to the device of the model's first parameter.
        num_samples: >= 1; all of a data set that has fewer. Drawn without replacement.
        seed: of the draw, and of what model and data set draw from torch (dropout, augmentation). Torch's global generators
            are afterwards as they were.
        memory_budget: bytes, >= 1, for the samples that are computed at once, at least one. Counted are each sample's
            gradients and what the first sample's forward kept for its backward. That is a rough share: temporary tensors
            come on top. When memory runs out, half as many samples are computed at once.
        progress: whether to show a bar, if tqdm is there; ``None``: when a sweep takes longer than two seconds.

    Raises:
        TypeError: the data set has no length or no items.
        ValueError: an option is out of range, or the data set is empty.

    Iterating computes a 0-d loss for each sample, with a graph of its own, when it is asked for. Its backward runs later, and
    the model is as it was by then. So activation checkpointing recomputes with normalisation layers in their own modes,
    unless ``fisher_diagonal`` is given the model; and autograd refuses a backward that needs a buffer which the forward
    wrote in place. ``gradients`` has neither trap.

    >>> data = torch.randn(10, 3), torch.zeros(10, dtype=torch.long)
    >>> losses = samkern.fisher.SampleLosses(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, data)
    >>> len(losses), next(iter(losses)).shape
    (10, torch.Size([]))
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        dataset: Any,
        num_samples: int = 1024,
        *,
        seed: int = 0,
        memory_budget: int = 256 * 2**20,
        progress: bool | None = None,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("memory_budget", memory_budget)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.memory_budget = memory_budget
        self.progress = progress
        self._samples = DrawnSamples(dataset, num_samples, seed)
        self._loss = _LossOfBatch(unwrapped(model), loss_fn)
        self._why_one_by_one = ""
        self._has_warned = False

    @property
    def module(self) -> nn.Module:
        """The model, and the loss if it is a module."""
        return self._loss

    def __call__(self) -> SampleLosses:
        """Itself: where a function that returns losses is expected, an instance will do."""
        return self

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Tensor]:
        for position in range(len(self)):
            with undisturbed(self._loss):
                loss = self._compute(position)
            yield loss

    def gradients(self, params: Sequence[Tensor], *, num_samples: int | None = None) -> Iterator[Gradients]:
        """Gradients of the samples, in chunks that the memory budget allows.

        ``params``: any, in any order. Yields for each of them a tensor of shape ``(c, *p.shape)`` in its dtype, for ``c``
        samples; ``None`` if it is frozen or takes no part. If none takes part, ``c`` is 1. ``.grad`` is not touched.
        ``num_samples``: of the first so many samples only.

        By ``torch.func.vmap``. A model that it cannot take is computed one sample at a time, and a warning says why.

        >>> model, data = torch.nn.Linear(2, 1, bias=False), (torch.eye(2), torch.zeros(2, 1))
        >>> losses = samkern.fisher.SampleLosses(model, lambda out, y: out.sum(), data)
        >>> chunk, = losses.gradients([model.weight])
        >>> chunk[0].sum(0)  # each sample's gradient is its x
        tensor([[1., 1.]])
        """
        weights = _Weights(self._loss, list(params))
        n = len(self) if num_samples is None else min(num_samples, len(self))
        n_at_once = self._plan(weights) if n > 1 else 1
        done = 0
        with progress_bar(n, "Fisher", "sample", self.progress) as advance:
            while done < n:
                c = min(n_at_once, n - done)
                try:
                    grads = self._vmapped(weights, range(done, done + c)) if c > 1 else self._single(weights, done)
                except Exception as error:
                    if c == 1:
                        if not self._has_warned:  # then it was this error that vmap met
                            self._why_one_by_one = ""
                        raise
                    n_at_once = c // 2 if _out_of_memory(error) else self._one_by_one(error)
                    continue
                yield grads
                del grads  # the budget is for one chunk: the next is computed before the name is taken again
                done += c
                advance(c)

    def _plan(self, weights: _Weights) -> int:
        """How many samples to compute at once: 1 also where ``vmap`` would not give the gradients of the loop."""
        if self._why_one_by_one or not weights.inside:
            return 1
        saved_bytes = 0

        def count(x: Tensor) -> Tensor:
            nonlocal saved_bytes
            saved_bytes += 0 if weights.owns(x) else x.numel() * x.element_size()
            return x

        stand_ins = {name: p.detach().requires_grad_() for name, p in weights.inside.items()}
        try:
            with undisturbed(self._loss), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
                loss = self._compute(0, stand_ins)
            weights.find_used(loss, stand_ins)
        except Exception as error:  # if it is not about vmap, the loop raises it again
            return self._one_by_one(error)
        return max(1, self.memory_budget // max(1, weights.n_bytes + saved_bytes))

    def _one_by_one(self, error: Exception) -> int:
        self._why_one_by_one = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return 1

    def _vmapped(self, weights: _Weights, positions: range) -> Gradients:
        def loss_of(values: dict[str, Tensor], x: Any, y: Any) -> Tensor:
            batch_of_one = tree_map(lambda part: part.unsqueeze(0), (x, y))
            loss: Tensor = functional_call(self._loss, values, batch_of_one)
            return loss

        values = {name: p.detach() for name, p in weights.inside.items()}
        x, y = self._samples.batch(positions, self._device)
        # Without gradients outside of grad: nothing is recorded for parameters that nobody asked for.
        with (
            torch.no_grad(),
            undisturbed(self._loss),
            random_numbers(self._samples.seeds[positions.start], self._device),
        ):
            grads = vmap(grad(loss_of), in_dims=(None, 0, 0), randomness="different")(values, x, y)
        return weights.in_order(grads)

    def _single(self, weights: _Weights, position: int) -> Gradients:
        found: dict[int, Tensor] = {}
        with undisturbed(self._loss):
            loss = self._compute(position)
            if loss.requires_grad and weights.wanted:
                grads = torch.autograd.grad(loss, weights.wanted, allow_unused=True)
                found = {
                    id(p): g if g.layout == torch.strided else g.to_dense()
                    for p, g in zip(weights.wanted, grads, strict=True)
                    if g is not None
                }
        if self._why_one_by_one and not self._has_warned:  # now that the loop could do it
            self._has_warned = True
            warnings.warn(
                "gradients of single samples are computed one by one, which is slower: torch.func.vmap does not take "
                f"this model or loss ({self._why_one_by_one})",
                stacklevel=3,
            )
        return [found[id(p)].unsqueeze(0) if id(p) in found else None for p in weights.params]

    def _compute(self, position: int, values: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of one sample, with a graph."""
        batch = self._samples.batch(range(position, position + 1), self._device)
        with torch.enable_grad(), random_numbers(self._samples.seeds[position], self._device):
            loss: Tensor = functional_call(self._loss, values, batch) if values else self._loss(*batch)
        return loss

    @property
    def _device(self) -> torch.device:
        first = next(self._loss.parameters(), None)
        return torch.device("cpu") if first is None else first.device


class FisherDiagonal(NamedTuple):
    """What ``fisher_diagonal`` returns.

    ``squares``: F, a row-major tensor per parameter, float32, or float64 for a float64 parameter; zeros where no loss
    depends on it. ``n_used``, ``n_left_out``: 0-d int64 on the parameters' device; the latter counts samples whose gradient
    was not finite.

    >>> samkern.fisher.FisherDiagonal([torch.ones(2)], torch.tensor(3), torch.tensor(0)).n_used
    tensor(3)
    """

    squares: list[Tensor]
    n_used: Tensor
    n_left_out: Tensor


def fisher_diagonal(
    params: Sequence[Tensor],
    losses: Iterable[Tensor] | SampleLosses,
    *,
    num_samples: int | None = None,
    model: nn.Module | None = None,
    backend: str | None = None,
) -> FisherDiagonal:
    """The mean of squared gradients of single samples, ``F = (1/N) sum_j (grad l_j)^2``, added up in the order of samples.

    A sample with an entry that is not finite, or whose squares overflow, is left out as a whole and counted. Nothing is
    read back from the device for it. Costs N forward-backward pairs of one sample, and the memory of F.

    Args:
        params: on one device, each once. Frozen ones and those that no loss depends on get zeros.
        losses: ``SampleLosses``, or an iterable of losses of single samples, tensors of one entry with a graph each.
        num_samples: takes at most so many losses, >= 1.
        model: its normalisation layers are in evaluation mode while an iterable computes its losses, and its buffers are
            afterwards as they were. ``SampleLosses`` see to their own model.
        backend: as for the optimizers.

    Raises:
        TypeError: a loss is not a tensor; a parameter is sparse, complex or not floating-point.
        ValueError: no losses, none that depends on a parameter, or one without a graph or with more than one entry; no
            parameters, or they are on several devices or share memory; ``num_samples`` is out of range.

    Mi et al. 2022 (arXiv 2210.05177).

    >>> w = torch.ones(2, requires_grad=True)
    >>> losses = (w @ x for x in torch.tensor([[1.0, 2.0], [3.0, -4.0]]))  # gradients are x
    >>> samkern.fisher.fisher_diagonal([w], losses).squares
    [tensor([ 5., 10.])]
    """
    params = list(params)
    if not params:
        raise ValueError("params is empty: give the parameters whose Fisher diagonal is wanted")
    check_parameters(params)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}")
    squares = [row_major_zeros(p, math_dtype(p.dtype)) for p in params]
    n_left_out = torch.zeros((), dtype=torch.int64, device=params[0].device)
    n, depends = 0, False
    # An optimizer asks from within its step, where torch records nothing.
    with torch.enable_grad(), nullcontext() if model is None else undisturbed(model):
        if any(map(is_sharded, params)):
            # What a model reads has been gathered from the shards: only backward() brings gradients to them.
            module = losses.module if isinstance(losses, SampleLosses) else model
            samples = _from_losses(losses, params, num_samples, _Backward(params, module))
        elif isinstance(losses, SampleLosses):
            samples = _from_chunks(losses.gradients(params, num_samples=num_samples))
        else:
            samples = _from_losses(losses, params, num_samples, _differentiated)
        with closing(samples):
            for grads in samples:
                n += 1
                given = [(f, g) for f, g in zip(squares, grads, strict=True) if g is not None]
                if given:
                    depends = True
                    n_left_out += _add(*zip(*given, strict=True), backend=backend)
                del grads, given  # what a sample looks at is a whole chunk
    if n == 0:
        raise ValueError("losses is empty: the Fisher diagonal is a mean over at least one sample")
    if not depends:
        raise ValueError(
            "the losses do not depend on any of the parameters: give parameters that the model uses and that require a "
            "gradient"
        )
    n_used = n - n_left_out
    for f in squares:
        f /= n_used.clamp(min=1)
    return FisherDiagonal(squares, n_used, n_left_out)


def _add(squares: Sequence[Tensor], grads: Sequence[Tensor], *, backend: str | None) -> Tensor:
    """Adds the squares of one sample. Returns whether it was left out instead, a 0-d bool on its device."""
    grads = [g.contiguous() for g in grads]  # autograd expands: the gradient of a sum has one entry in memory
    dtypes = {math_dtype(g.dtype) for g in grads}
    largest = torch.finfo(torch.float32 if torch.float32 in dtypes else torch.float64).max
    left_out = ~(ops.norms(grads, backend=backend)[0, -1] <= largest)  # a comparison with NaN is false
    ops.fisher_accumulate(squares, grads, skip=left_out, backend=backend)
    return left_out


def _from_chunks(chunks: Iterable[Gradients]) -> Samples:
    for grads in chunks:
        c = next((len(g) for g in grads if g is not None), 1)
        yield from zip(*(itertools.repeat(None, c) if g is None else g.unbind() for g in grads), strict=True)
        del grads


def _from_losses(
    losses: Iterable[Tensor],
    params: list[Tensor],
    n: int | None,
    differentiate: Callable[[Tensor, list[Tensor]], Sequence[Tensor | None]],
) -> Samples:
    if isinstance(losses, Tensor):
        raise TypeError(
            "losses is a tensor, whose entries share one graph; give an iterable of losses with a graph each"
        )
    wanted = [p for p in params if p.requires_grad]
    for i, loss in enumerate(itertools.islice(losses, n)):
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss {i} must be a tensor, got {type(loss).__name__}; give the loss, not its .item()")
        if loss.numel() != 1:
            raise ValueError(
                f"loss {i} must have one entry, got shape {tuple(loss.shape)}; give a loss for each sample"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"loss {i} does not require a gradient: compute it from the parameters, without no_grad or detach"
            )
        grads = iter(differentiate(loss.sum(), wanted) if wanted else ())
        yield [next(grads) if p.requires_grad else None for p in params]


def _differentiated(loss: Tensor, params: list[Tensor]) -> Sequence[Tensor | None]:
    grads: Sequence[Tensor | None] = torch.autograd.grad(loss, params, allow_unused=True)
    return grads


class _Backward:
    """Gradients by ``backward()``, which leaves ``.grad`` of ``params`` and of the model as it was."""

    def __init__(self, params: list[Tensor], module: nn.Module | None) -> None:
        self._touched = list(dict.fromkeys([*params, *(module.parameters() if module is not None else ())]))

    def __call__(self, loss: Tensor, params: list[Tensor]) -> Sequence[Tensor | None]:
        before = [p.grad for p in self._touched]
        try:
            for p in self._touched:
                p.grad = None
            torch.autograd.backward(loss)
            return [None if p.grad is None else in_place_of(p.grad, p) for p in params]
        finally:
            for p, grad in zip(self._touched, before, strict=True):
                p.grad = grad


# ---- what a sweep differentiates ------------------------------------------------------------------------------------


class _LossOfBatch(nn.Module):
    """Model and loss as one module, so that a loss that reads the model's weights sees those it is to be computed with."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, x: Any, y: Any) -> Tensor:
        loss = self.loss_fn(self.model(x), y)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn must return a tensor, got {type(loss).__name__}; return the loss, not its .item()"
            )
        if loss.numel() != 1:
            raise ValueError(f"loss_fn must return the mean loss of a batch, one entry, got shape {tuple(loss.shape)}")
        return loss.reshape(())


class _Weights:
    """The parameters of a sweep, and which of them the model reads in a way that ``functional_call`` can replace."""

    def __init__(self, module: nn.Module, params: list[Tensor]) -> None:
        self.params = params
        self.wanted = [p for p in params if p.requires_grad]
        self._names = {id(p): name for name, p in module.named_parameters()}
        self.inside = {self._names[id(p)]: p for p in self.wanted if id(p) in self._names}
        self.n_bytes = sum(p.numel() * p.element_size() for p in self.inside.values())
        self._used: set[str] = set()
        held = itertools.chain(module.parameters(), module.buffers(), self.wanted)
        self._memory = {x.untyped_storage().data_ptr() for x in held if x.layout == torch.strided}

    def owns(self, x: Tensor) -> bool:
        """Whether ``x`` lies in the memory of a parameter or buffer."""
        return x.layout == torch.strided and x.untyped_storage().data_ptr() in self._memory

    def find_used(self, loss: Tensor, stand_ins: dict[str, Tensor]) -> None:
        """Notes which weights ``loss`` depends on. Raises if it reached some that stand-ins were given for, or others."""
        if not loss.requires_grad:
            return
        grads = torch.autograd.grad(loss, [*stand_ins.values(), *self.wanted], allow_unused=True)
        if any(g is not None for g in grads[len(stand_ins) :]):
            raise RuntimeError("the loss depends on parameters that are not read as attributes of the model's modules")
        self._used = {name for name, g in zip(stand_ins, grads, strict=False) if g is not None}

    def in_order(self, grads: dict[str, Tensor]) -> Gradients:
        """Gradients of chunks by name, as the caller's list: ``None`` for those that take no part."""
        found: Gradients = []
        for p in self.params:
            name = self._names.get(id(p), "")
            g = grads.get(name) if p.requires_grad else None
            # vmap expands zeros for what takes no part. The first sample may have missed a weight by chance: then it is real.
            found.append(None if g is None or (name not in self._used and g.stride(0) == 0) else g)
        return found


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
