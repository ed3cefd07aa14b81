"""Flat-LoRA: adapters are trained where the merged weight is flat, by noise on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..lora import AdaptedWeight, Adapter, adapted_weights, named_weights
from ..options import Climb, ClimbGroup, Noise
from .checks import at_least, at_least_int
from .engine import SharpnessAware
from .noisy_layers import NoisyForward, NoisyWeight, Scratch, enter
from .perturbation import SeededNoise


class MergedNoise(SeededNoise):
    """The only gradient of a step is taken where layers compute with ``W + scale B A + noise``; nothing is written.

    Row i of the noise has a standard deviation of ``sigma_t norm(row i of W + scale B A) / sqrt(d_in)``, so that it is
    ``sigma_t`` of the row at any width; ``sigma_t = sigma (1 - cos(pi s)) / 2`` with the progress
    ``s = min(t / total_steps, 1)`` grows from 0 to ``sigma``.

    Args:
        model: whose layers have the adapters.
        sigma: of the noise in the end, relative to a row, >= 0. Of a group: for the layers whose factors are in it. Layers
            without a factor in any group have no noise.
        total_steps: of the training, >= 1. Later steps have s = 1.
        adapters: which; None: all that ``model`` has.
        draws: how many times a step calls a single closure, each time with another noise. Of several closures, each has one.
        seed: of the noise, >= 0; that of a checkpoint wins. Noise goes by seed, step, draw and the place of an entry among all
            adapted weights.
        backend: that makes it; None: the fastest.

    Raises:
        TypeError, ValueError: an adapter that this is not for; the message names it and says what to do.

    Li et al., ICML 2025, https://arxiv.org/abs/2409.14396.

    >>> layer = torch.nn.Linear(4, 3).requires_grad_(False)
    >>> adapter = samkern.Adapter(layer.weight, torch.zeros(2, 4), torch.zeros(3, 2))
    >>> samkern.optim.MergedNoise(layer, 0.05, total_steps=100, adapters=[adapter]).sigma_at(100, 0.05)
    0.05
    """

    radius = "sigma"
    of_parameters = False

    def __init__(
        self,
        model: nn.Module,
        sigma: float = 0.05,
        total_steps: int | None = None,
        *,
        adapters: Sequence[Adapter] | None = None,
        draws: int = 1,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model= must be the module whose layers have the adapters, got {model!r}")
        super().__init__(draws, seed)
        at_least_int("total_steps", total_steps, 1)  # type: ignore[arg-type]
        self.total_steps, self.backend = total_steps, backend
        self.options = {"sigma": sigma}
        self.check(self.options)
        self._weights = adapted_weights(model) if adapters is None else named_weights(adapters, model)
        self._forwards = [[NoisyForward(*owner) for owner in x.owners] for x in self._weights]
        self._scratch = Scratch()

    def check(self, group: Mapping[str, Any]) -> None:
        at_least("sigma", group["sigma"], 0)

    def climb(self, group: Mapping[str, Any]) -> ClimbGroup:
        return ClimbGroup(Climb.EUCLIDEAN, 0.0)  # parameters of the optimizer stay where they are

    def explain(self, group: Mapping[str, Any]) -> str:
        return f"sigma = {group['sigma']:g}, W + scale B A of their layers + sigma_t norm(row) / sqrt(d_in) z, z normal"

    def sigma_at(self, t: int, sigma: float) -> float:
        """sigma_t, of a ``sigma``."""
        s = min(t / self.total_steps, 1.0)  # type: ignore[operator]
        return sigma / 2 * (1 - math.cos(math.pi * s))

    def enter(self, t: int, draw: int, groups: Sequence[Mapping[str, Any]], until_done: ExitStack) -> None:
        sigmas = {p: group["sigma"] for group in groups for p in group["params"]}
        enter(self._noisy(Noise(self.seed, t, draw), sigmas), until_done)

    def _noisy(self, noise: Noise, sigmas: Mapping[Tensor, float]) -> list[tuple[NoisyWeight, list[NoisyForward]]]:
        noisy, first = [], 0
        largest = max(x.weight.numel() for x in self._weights)
        for x, forwards in zip(self._weights, self._forwards, strict=True):
            factors = x.factors()
            of_layer = [sigmas[p] for f in factors for p in (f.a, f.b) if p in sigmas]
            std = self.sigma_at(noise.t, max(of_layer)) if of_layer else 0.0
            if std > 0 and x.weight.numel() > 0:
                norms = x.row_norms(factors) / math.sqrt(x.rows.shape[1])
                made = NoisyWeight(x, std, norms, noise, first, self._scratch, largest, self.backend)
                noisy.append((made, forwards))
            first += x.weight.numel()
        return noisy

    @property
    def weights(self) -> list[AdaptedWeight]:
        """The adapted weights, in the order in which noise counts their entries."""
        return list(self._weights)

    @property
    def scratch(self) -> list[Tensor]:
        """What is held for noisy weights: for each dtype a buffer as large as the largest of them."""
        return list(self._scratch.buffers.values())

    def held(self) -> Sequence[Tensor]:
        return self.scratch

    def extra_bytes(self) -> int:
        # Without autocast, which may want another dtype.
        there = {buffer.dtype for buffer in self.scratch}
        largest = max(x.weight.numel() for x in self._weights)
        return sum(largest * dtype.itemsize for dtype in {x.weight.dtype for x in self._weights} - there)


class FlatLoRA(SharpnessAware):
    """Flat-LoRA: the base receives the gradient of the factors A and B with noise on ``W + scale B A``, as large as its rows.

    ``step(closure)`` calls the closure once. Without one: ``with opt.perturbed():`` around forward and backward, then
    ``opt.step()``. Within, layers compute with noise; the frozen weights are never written.

    Args:
        params_or_model: a model with LoRA layers, of ``peft`` or others (see ``samkern.lora``), of which all parameters that
            require a gradient are trained; or parameters or param groups, as for ``torch.optim``, with ``model=``.
        base: a ``torch.optim`` class, whose options follow, or a ready instance.
        sigma: of the noise in the end of the training, relative to the norm of a row, >= 0. May differ per group: a layer
            takes that of the group of its factors.
        adapters: a list of ``samkern.Adapter``: the noisy ones, if not all; None: those that are found in the model.
        model: the model, if ``params_or_model`` are parameters.
        total_steps: of the training. The noise grows from 0 along half a cosine.
        draws: of a single closure, each with another noise; the base receives the mean gradient.
        seed: of the noise, which is never stored, and the same on every rank and after a resume.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs one forward-backward pair, and noise twice for every entry of W. Memory: the largest W once, in the dtype of
    the pass, and a number for each row. In a compiled model the layers that have noise run as they are written.

    Raises:
        ValueError: an option is out of range; no adapters, or merged, disabled, trained, sharded or offloaded ones.
        TypeError: adapters of embeddings and convolutions, on quantised weights, or that add more than a product (DoRA).

    Li et al., ICML 2025, https://arxiv.org/abs/2409.14396.

    >>> class LoRALinear(torch.nn.Linear):
    ...     scaling = 2.0
    ...     def __init__(self, d_in, d_out, r=2):
    ...         super().__init__(d_in, d_out)
    ...         self.requires_grad_(False)
    ...         self.lora_A, self.lora_B = torch.nn.Linear(d_in, r, bias=False), torch.nn.Linear(r, d_out, bias=False)
    ...     def forward(self, x):
    ...         return super().forward(x) + self.scaling * self.lora_B(self.lora_A(x))
    >>> model = LoRALinear(4, 3)
    >>> opt = samkern.FlatLoRA(model, torch.optim.AdamW, lr=1e-3, sigma=0.05, total_steps=100)
    >>> with opt.perturbed():
    ...     model(torch.ones(2, 4)).square().mean().backward()
    >>> opt.step()
    >>> opt.evaluations
    1
    """

    def __init__(
        self,
        params_or_model: Any,
        base: Any,
        sigma: float = 0.05,
        *,
        total_steps: int | None = None,
        adapters: Sequence[Adapter] | None = None,
        model: nn.Module | None = None,
        draws: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        params, model = trained(params_or_model, base, model)
        of_noise = {"adapters": adapters, "draws": draws, "seed": seed, "backend": options.get("backend")}
        noise = MergedNoise(model, sigma, total_steps, **of_noise)  # type: ignore[arg-type]
        super().__init__(params, base, perturbation=noise, model=model, **options)


def trained(params_or_model: Any, base: Any, model: nn.Module | None) -> tuple[Any, nn.Module | None]:
    """Parameters for ``base``, and the model: of a model all that require a gradient, or those that a ready base has."""
    if not isinstance(params_or_model, nn.Module):
        return params_or_model, model
    if model is not None and model is not params_or_model:
        raise ValueError("model= is another one than that whose parameters are trained: leave it out")
    if not isinstance(base, type) and hasattr(base, "param_groups"):
        return None, params_or_model
    params = [p for p in params_or_model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("no parameter of the model requires a gradient: adapters are trained, requires_grad_(True)")
    return params, params_or_model
