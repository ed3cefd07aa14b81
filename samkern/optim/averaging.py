"""Averages of the weights along a training, SWA and EMA: taken in by the steps themselves, and swapped into the model.

A samkern optimizer takes its weights in with the pass that updates them; after the step of any other, and where that pass is
not ours, it is one more over weights and averages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..options import AverageOptions
from ..reference import average_gain, math_dtype
from ..shards import is_sharded, like, local, locals_of, spread_as
from ..tensors import DTYPES, describe, is_capturing
from ..undisturbed import unchanged_buffers
from .attached import Attached
from .checks import at_least_int, between
from .companion import RunningAverage, within_wrappers
from .eager import eager
from .engine import SharpnessAware
from .keeper import parameters_of

if TYPE_CHECKING:
    from .loop import StepLoop


class WeightAverage(Attached, RunningAverage):
    """What all averages share: which steps are taken in, swapping, checkpoints. ``EMA``, ``SWA`` and ``SWAD`` are public.

    It belongs to the optimizer that it was made for, whose steps drive it, until ``detach()``. It covers all parameters of the
    groups, frozen ones too; one that is added later counts, for the steps before, with its weights after its first step.
    Averages are float32 (float64 for float64 weights), in tensors that keep their places.

    ``copy.deepcopy`` and pickle take the optimizer along: copy the two together, with the model.
    """

    _made_anew = ("_until_out",)

    def __init__(
        self, optimizer: Optimizer, decay: float | None = None, warmup: bool = False, start: int = 0, every: int = 1
    ) -> None:
        at_least_int("start", start, 0)
        at_least_int("every", every, 1)
        self._decay, self._warmup, self._start, self._every = decay, warmup, start, every
        self._steps = 0
        self._has_some = False  # whether the host knows that there are weights in the averages
        self._of: dict[Tensor, Tensor] = {}  # the averages by parameter
        self._joined: list[Tensor] = []  # parameters whose averages have been made for the step under way
        self._aside: dict[Tensor, Tensor] | None = None  # the weights, while their averages are swapped in
        self._until_out = contextlib.ExitStack()
        inner = within_wrappers(optimizer)
        params = parameters_of(inner)
        for i, p in enumerate(params):
            if p.layout != torch.strided or p.dtype not in DTYPES:
                raise TypeError(
                    f"{describe(params, i)}: {p.layout} {p.dtype} cannot be averaged; use a dense real parameter"
                )
        self._taken = torch.zeros(1, dtype=torch.int64, device=params[0].device if params else "cpu")
        self.attach_to(inner)

    def _hooks_into(self, optimizer: Optimizer) -> list[RemovableHandle]:
        return [
            optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def check(self, opt: StepLoop) -> None:
        """Raises ``ValueError`` if ``opt`` is for graphs, and only some steps are taken in."""
        if opt.capturable and (self._start > 0 or self._every > 1):
            raise ValueError(
                f"capturable=True does not go with {type(self).__name__}(start={self._start}, every={self._every}): a graph "
                "takes its weights in in every replay, or in none; attach it when it shall begin, with every=1"
            )

    # ---- taking weights in

    def due(self) -> AverageOptions | None:
        """How the weights after this step are taken in; None: they are not."""
        t = self._steps - self._start
        return AverageOptions(self._taken, self._decay, self._warmup) if t >= 0 and t % self._every == 0 else None

    @torch.no_grad()
    def tensors(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The averages of ``params``, made where they are missing."""
        if params and self._taken.device != params[0].device:
            self._taken = self._taken.to(params[0].device)
        self._of = {p: self._made(p, x) if (x := self._of.get(p)) is None or not _fits(x, p) else x for p in params}
        return list(self._of.values())

    def _made(self, p: Tensor, moved: Tensor | None) -> Tensor:
        """A new average of ``p``: a copy of the weights, which may be perturbed; or of the one there was, where ``p`` moved."""
        part = local(p)
        if is_capturing(part.device):
            raise RuntimeError(
                f"averages have to be made ({type(self).__name__}), and a graph is being recorded: take some steps that are "
                "averaged before recording"
            )
        if moved is None:
            self._joined.append(p)
        source = part if moved is None else local(spread_as(moved, p))
        # Not empty_like, which closes the gaps of strided views.
        average = torch.empty_strided(part.shape, part.stride(), dtype=math_dtype(p.dtype), device=part.device)
        return like(average.copy_(source), p)

    @torch.no_grad()
    def add(self, params: Sequence[Tensor], skip: Tensor | None = None) -> None:
        """Takes the weights in as ``due()`` says, unless ``skip``, a 0-d bool, is true."""
        averages, options = self.tensors(params), self.due()
        if options is None:
            return
        gain = average_gain(*options)
        gain = gain if skip is None else torch.where(skip.to(gain.device), 0.0, gain)
        move_towards(averages, params, gain)
        self._taken += 1 if skip is None else ~skip.to(gain.device)

    @torch.no_grad()
    def settle(self) -> None:
        """The step has been taken, or skipped."""
        for p in self._joined:
            local(self._of[p]).copy_(local(p))
        self._joined.clear()
        self._steps += 1

    def before_step(self) -> None:
        """Raises ``RuntimeError`` while the averages are in the place of the weights."""
        self.require_out("a step of the optimizer")

    @eager
    def _after_step(self) -> None:
        """Of an optimizer that is not ours."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self.due() is not None:
            # A fused step under a GradScaler is called in any case, and finds out by this tensor.
            found_inf = getattr(optimizer, "found_inf", None)
            skip = found_inf.squeeze() != 0 if isinstance(found_inf, Tensor) else None
            self.add(parameters_of(optimizer), skip)
        self.settle()

    # ---- using them

    @property
    def n_averaged(self) -> int:
        """How many steps' weights are in the average. Reads the device."""
        return int(self._taken)

    @property
    def steps(self) -> int:
        """Steps of the optimizer since it was attached, those that were skipped or not taken in too."""
        return self._steps

    @property
    @torch.no_grad()
    def averages(self) -> list[Tensor]:
        """For each parameter, in the order of the groups: float32, or float64. Before the first, copies of the weights."""
        params = self._parameters()
        averages = self.tensors(params)
        if self.n_averaged == 0:
            _copy(averages, params)
        return averages

    def weights_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages by the names that ``model`` has for them, in the dtypes of its weights: for ``functional_call``.

        What is not averaged is there as it is; so is everything before the first average. Reads the device until there is one.
        """
        averages = self._averages_by_parameter()
        return {name: averages.get(p, p).detach().to(p.device, p.dtype) for name, p in model.named_parameters()}

    def _averages_by_parameter(self) -> Mapping[Tensor, Tensor]:
        """Empty before the first average: what is held until then may be weights of an earlier step."""
        if not self._has_some:
            self._has_some = self._steps > self._start and self.n_averaged > 0
        return self._of if self._has_some else {}

    def _parameters(self) -> list[Tensor]:
        optimizer = self._optimizer()
        return list(self._of) if optimizer is None else parameters_of(optimizer)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module | None = None) -> Iterator[None]:
        """In the block, weights are the averages; afterwards bitwise as before, also if it raises. Holds a copy of them.

        With ``model``, its buffers, too, are put back, so that ``update_bn(model, loader)`` may be called in the block. Give it
        also if it is sharded by ``fully_shard``, which may keep gathered weights. Before any weights have been taken in,
        nothing changes.

        Raises:
            RuntimeError: they are swapped in already, or a step is under way; and from a step within the block.
        """
        self.require_out("swapped()")
        try:
            self.swap_in(model)
            yield
        finally:
            if self._aside is not None:
                self.swap_out()

    @torch.no_grad()
    def swap_in(self, model: nn.Module | None = None) -> None:
        """As ``swapped``, until ``swap_out()``."""
        self._require_idle("swap_in()")
        self.require_out("swap_in()")
        params = self._parameters()
        averages, aside = self.averages, {p: local(p).clone() for p in params}
        if model is not None:
            self._until_out.enter_context(unchanged_buffers(model))
            self._until_out.callback(_reshard, model)
            _reshard(model)
        self._aside = aside  # from here on, whatever happens, swap_out() finds all that it needs
        _copy(params, averages)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Puts back what ``swap_in`` has set aside.

        Raises:
            RuntimeError: the averages are not swapped in.
        """
        if self._aside is None:
            raise RuntimeError("swap_out(): the averages are not swapped in; call swap_in() before")
        _copy(list(self._aside), list(self._aside.values()))
        self._aside = None
        self._until_out.close()

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Makes the averages the weights, for good: at the end of a training. Then re-estimate BatchNorm: ``update_bn``.

        Raises:
            RuntimeError: nothing has been averaged yet, they are swapped in, or a step is under way.
        """
        self._require_idle("copy_to_weights()")
        self.require_out("copy_to_weights()")
        self._require_some()
        _copy(self._parameters(), self.averages)

    def _require_some(self) -> None:
        if self.n_averaged == 0:
            raise RuntimeError(
                f"copy_to_weights(): no weights have been averaged in {self._steps} steps (start={self._start})"
            )

    def require_out(self, what: str) -> None:
        """Raises ``RuntimeError`` while the averages are in the place of the weights."""
        if self._aside is not None:
            raise RuntimeError(
                f"{what} while the averages of {type(self).__name__} are swapped in: leave the block of swapped(), or call "
                "swap_out()"
            )

    def _require_idle(self, what: str) -> None:
        optimizer = self._optimizer()
        if isinstance(optimizer, SharpnessAware):
            optimizer.require_idle(what)

    # ---- checkpoints and copies

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact continuation needs; averages by the index of their parameter. Not the options."""
        params = self._parameters()
        index = {p: i for i, p in enumerate(params)}
        return {
            "kind": type(self).__name__,
            "n_parameters": len(params),
            "averages": {index[p]: x for p, x in self._of.items() if p in index},
            "taken": self._taken,
            "steps": self._steps,
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if ``state`` is of another kind of average, or of other parameters."""
        params, kind = self._parameters(), type(self).__name__
        if state.get("kind") != kind:
            raise ValueError(f"the state is of {state.get('kind')!r}, this is {kind}")
        if state["n_parameters"] != len(params):
            raise ValueError(f"the state is of {state['n_parameters']} parameters, the optimizer has {len(params)}")
        check_shapes(state["averages"], params)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes ``state_dict`` back, into the tensors that are there.

        Raises:
            ValueError: it is of another kind of average, or of other parameters; nothing has been loaded then.
            RuntimeError: the averages are swapped in.
        """
        self.require_out("load_state_dict()")
        self.check_state_dict(state)
        params = self._parameters()
        loaded = state["averages"]
        if loaded:
            for i, average in enumerate(self.tensors(params)):
                if i in loaded:
                    local(average).copy_(local(spread_as(loaded[i], params[i])))
            self._joined = [p for i, p in enumerate(params) if i not in loaded]
        self._taken.copy_(state["taken"])
        self._steps, self._has_some = state["steps"], False

    def extra_bytes(self, params: Sequence[Tensor]) -> int:
        """Of averages that are not there yet."""
        return sum(bytes_of_average(p) for p in params if p not in self._of)

    def __getstate__(self) -> dict[str, Any]:
        self.require_out("copying or pickling")
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_until_out": contextlib.ExitStack()})


class EMA(WeightAverage):
    """An exponential average of weights: ``avg = decay avg + (1 - decay) w`` after a step; the first is ``w``.

    Args:
        optimizer: one of samkern's, whose update takes the weights in within the same pass, or any of ``torch.optim``. With the
            latter, a step that a ``GradScaler`` skips is not taken in; samkern's take in none that they skip.
        decay: from 0 to 1. The average reaches about ``1 / (1 - decay)`` times ``every`` steps back.
        warmup: with m weights in the average, the decay is at most ``(1 + m) / (10 + m)``.
        every: takes in every so many steps, >= 1.

    Costs memory for the averages (float32, float64 for float64 weights), and 8 bytes of traffic per parameter if the update is
    fused, else 12. BatchNorm keeps the statistics of the weights: to have those of the average, call ``update_bn`` within
    ``swapped(model)``.

    Raises:
        ValueError: an option is out of range; the message names it and its value.
        TypeError: ``optimizer`` is none, or has a sparse, complex or integer parameter.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    >>> ema = samkern.EMA(opt, decay=0.99)
    >>> _ = opt.step(lambda: model(torch.ones(4, 2)).square().mean().backward())
    >>> with ema.swapped(model):
    ...     averaged = model(torch.ones(1, 2))
    >>> ema.n_averaged
    1
    """

    def __init__(self, optimizer: Optimizer, decay: float = 0.999, *, warmup: bool = False, every: int = 1) -> None:
        between("decay", decay, 0, 1)
        super().__init__(optimizer, decay, warmup, every=every)

    def __repr__(self) -> str:
        return f"EMA(decay={self._decay}, warmup={self._warmup}, every={self._every}, steps={self._steps})"


class SWA(WeightAverage):
    """Stochastic weight averaging: the mean of the weights after steps ``start``, ``start + every``, and so on.

    With a learning rate that stays high in that phase, as ``torch.optim.swa_utils.SWALR`` has it. At the end::

        swa.copy_to_weights()
        samkern.update_bn(model, loader)

    Args:
        optimizer: one of samkern's, whose update takes the weights in within the same pass, or any of ``torch.optim``. With the
            latter, a step that a ``GradScaler`` skips is not taken in; samkern's take in none that they skip.
        start: the first step that is taken in, >= 0, counted from 0 at this moment.
        every: takes in every so many steps from there, >= 1.

    Costs memory for the averages (float32, float64 for float64 weights) from ``start`` on, and on steps that are taken in 8
    bytes of traffic per parameter if the update is fused, else 12.

    Raises:
        ValueError: an option is out of range; the message names it and its value.
        TypeError: ``optimizer`` is none, or has a sparse, complex or integer parameter.

    Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407, algorithm 1.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = torch.optim.AdamW(model.parameters())
    >>> swa = samkern.SWA(opt, start=2, every=2)
    >>> for _ in range(5):
    ...     model(torch.ones(4, 2)).square().mean().backward()
    ...     opt.step()
    >>> swa.n_averaged
    2
    >>> swa.copy_to_weights()
    """

    def __init__(self, optimizer: Optimizer, *, start: int = 0, every: int = 1) -> None:
        super().__init__(optimizer, start=start, every=every)

    def restart(self, steps: int = 0) -> None:
        """Forgets what was averaged, and counts on from ``steps``."""
        self._taken.zero_()
        self._steps, self._has_some = steps, False

    def __repr__(self) -> str:
        return f"SWA(start={self._start}, every={self._every}, steps={self._steps})"


def move_towards(averages: Sequence[Tensor], weights: Sequence[Tensor], gain: Tensor | float) -> None:
    """``average += gain (w - average)``; of gain 1, ``average = w``. ``gain``: 0-d float64, or a number."""
    ours, theirs = locals_of(averages), locals_of(weights)
    kinds = {(x.device, x.dtype) for x in (*ours, *theirs)}
    if len(kinds) == 1:
        torch._foreach_lerp_(ours, theirs, [torch.as_tensor(gain).to(*kinds.pop())] * len(ours))
        return
    gains = {kind: torch.as_tensor(gain).to(*kind) for kind in kinds}
    for average, w in zip(ours, theirs, strict=True):  # one by one: there is one converted copy at a time
        kind = average.device, average.dtype
        average.lerp_(w.to(*kind), gains[kind])


def bytes_of_average(p: Tensor) -> int:
    """What the average of ``p`` takes of the memory of this process."""
    return local(p).numel() * math_dtype(p.dtype).itemsize


def check_shapes(averages: Mapping[int, Tensor], params: Sequence[Tensor]) -> None:
    """Raises ``ValueError`` if averages by index are not of ``params``."""
    for i, x in averages.items():
        if i >= len(params) or x.shape != params[i].shape:
            raise ValueError(f"average {i} of the state, of shape {tuple(x.shape)}, belongs to other parameters")


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for a, b in zip(to, source, strict=True):
        local(a).copy_(local(b))
    # Autocast keeps half-precision copies of weights as long as its block lasts.
    torch.clear_autocast_cache()


def _fits(average: Tensor, p: Tensor) -> bool:
    if is_sharded(p):
        if not is_sharded(average) or average.placements != p.placements:
            return False
        average, p = local(average), local(p)
    return (
        average.device == p.device
        and average.dtype == math_dtype(p.dtype)
        and average.shape == p.shape
        and average.stride() == p.stride()
    )


def _reshard(model: nn.Module) -> None:
    """Drops weights that ``fully_shard`` has gathered and kept: they are not those of the parameters any more."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()
