"""Low-rank adapters: layers that compute with ``W + scale B A``, W frozen. Found by their attributes, whoever has made them.

A layer of ``peft`` has ``base_layer``, and ``lora_A``, ``lora_B`` and ``scaling`` by the name of an adapter. Any other module
counts that has ``weight``, ``lora_A``, ``lora_B`` (parameters, or linear modules) and ``scaling`` itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .shards import is_sharded
from .tensors import DTYPES

_CHUNK = 1 << 22  # entries of a weight that are converted at once


@dataclass(frozen=True, eq=False)
class Adapter:
    """A frozen weight and the factors that are added to it: ``weight + scale b @ a``.

    Args:
        weight: [d_out, d_in].
        a: [r, d_in], trained.
        b: [d_out, r], trained.
        scale: ``alpha / r``, of most.
        fan_in_fan_out: ``weight`` is [d_in, d_out], as that of the ``Conv1D`` of Transformers.

    Raises:
        ValueError: the shapes do not fit each other.

    >>> layer = torch.nn.Linear(4, 3)
    >>> samkern.Adapter(layer.weight, a=torch.zeros(2, 4), b=torch.zeros(3, 2), scale=2.0).a.shape
    torch.Size([2, 4])
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float = 1.0
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        _check_shapes("Adapter", _rows(self.weight, self.fan_in_fan_out), self.a, self.b)


class Factors(NamedTuple):
    """An adapter without its weight: ``scale b @ a``."""

    name: str
    a: Tensor
    b: Tensor
    scale: Any = 1.0


class AdaptedWeight:
    """A frozen weight, the modules that compute with it, and the factors that are added to it now.

    ``owners``: modules, each with the name under which it has the weight. ``layer``: whose factors may change; None: they
    are ``factors``.
    """

    def __init__(
        self,
        name: str,
        owners: Sequence[tuple[nn.Module, str]],
        transposed: bool,
        layer: nn.Module | None = None,
        factors: Sequence[Factors] = (),
    ) -> None:
        self.name, self.owners, self.transposed = name, list(owners), transposed
        self._layer, self._factors = layer, list(factors)
        self._squares: tuple[object, Tensor] | None = None
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_squares": None}  # goes by addresses

    @property
    def weight(self) -> Tensor:
        """As it is stored."""
        module, attribute = self.owners[0]
        weight: Tensor = module._parameters[attribute]  # type: ignore[assignment]
        return weight

    @property
    def rows(self) -> Tensor:
        """The weight as [d_out, d_in]: shares its memory."""
        return _rows(self.weight.detach(), self.transposed)

    def factors(self) -> list[Factors]:
        """What is added to the weight now: several adapters may be active, or none.

        Raises:
            ValueError: they are merged or disabled, or do not fit.
            TypeError: they are more than a product.
        """
        if self._layer is None:
            return self._factors
        _check_adds_product(self.name, self._layer)
        found = list(_active_factors(self.name, self._layer))
        for f in found:
            _check_shapes(self.name, self.rows, f.a, f.b)
        return found

    @torch.no_grad()
    def row_norms(self, factors: Sequence[Factors]) -> Tensor:
        """Norms of the rows of ``weight + sum scale b @ a``, which is not formed: float64 [d_out].

        ``norm(w + b A)^2 = norm(w)^2 + 2 <b, A w> + b A A' b'`` for a row w and its b; the first is computed once.
        """
        rows, norm_sq = self.rows, self._row_squares().clone()
        if not factors:
            return norm_sq.sqrt()
        dtype = torch.promote_types(rows.dtype, torch.float32)
        a = torch.cat([f.a.detach().to(dtype) for f in factors])
        b = torch.cat([f.b.detach().double() * f.scale for f in factors], 1)
        wa = torch.cat([(part.to(dtype) @ a.T).double() for part in _parts(rows)])
        gram = a.double() @ a.double().T
        norm_sq += (b * (2 * wa + b @ gram)).sum(1)
        return norm_sq.clamp_(min=0).sqrt_()

    def _row_squares(self) -> Tensor:
        weight = self.weight
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device, weight.shape)
        if self._squares is None or self._squares[0] != key:
            self._squares = key, torch.cat([part.double().square().sum(1) for part in _parts(self.rows)])
        return self._squares[1]

    def _check(self) -> None:
        weight, what = self.weight, self.name
        kind = type(weight).__name__
        plain = type(weight) in (nn.Parameter, Tensor)
        if is_sharded(weight):
            raise ValueError(
                f"{what}: the weight is sharded, and noise goes by the place of an entry in the whole weight; use "
                "DistributedDataParallel"
            )
        if not plain or weight.dtype not in DTYPES or weight.layout != torch.strided:
            raise TypeError(
                f"{what}: noise is added to dense floating-point weights, got {kind} of {weight.dtype}; load the model without "
                "quantisation, or name the layers that have floating-point weights in adapters="
            )
        if weight.dim() != 2:
            raise TypeError(
                f"{what}: noise is added to weights of linear layers, got one of shape {tuple(weight.shape)}; name the linear "
                "layers in adapters="
            )
        if weight.requires_grad:
            raise ValueError(f"{what}: the weight is trained itself; call requires_grad_(False) on it, or leave it out")
        for f in self.factors():
            if f.a.device != weight.device or f.b.device != weight.device:
                raise ValueError(
                    f"{what}: the weight is on {weight.device}, its factors on {f.a.device} and {f.b.device}; noise needs them "
                    "on one device, without offloading"
                )


def adapted_weights(model: nn.Module) -> list[AdaptedWeight]:
    """The weights of all layers of ``model`` that have adapters, in the order of its modules.

    Raises:
        TypeError: a layer is not linear, is quantised, or adds more than a product.
        ValueError: there is none; adapters are merged or disabled; a weight is trained or sharded.
    """
    found = []
    for name, layer in model.named_modules():
        if not _is_adapted(layer):
            continue
        what = f"layer {name!r} ({type(layer).__name__})"
        base = getattr(layer, "base_layer", layer)
        if len(getattr(layer, "lora_embedding_A", ())) > 0:
            raise TypeError(f"{what}: noise is added to weights of linear layers; name those in adapters=")
        if not isinstance(base, nn.Module) or not isinstance(base._parameters.get("weight"), Tensor):
            raise TypeError(
                f"{what}: {type(base).__name__} has no parameter `weight` of its own; name layers that do in adapters="
            )
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
        found.append(AdaptedWeight(what, [(base, "weight")], transposed, layer))
    return found or _none_found()


def named_weights(adapters: Sequence[Adapter], model: nn.Module) -> list[AdaptedWeight]:
    """The weights of ``adapters``, of which several may have the same, and the modules of ``model`` that have them.

    Raises:
        TypeError, ValueError: as of ``adapted_weights``; or ``model`` has not such a parameter.
    """
    found: dict[int, list[int]] = {}
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapters[{i}] must be a samkern.Adapter, got {adapter!r}")
        found.setdefault(id(adapter.weight), []).append(i)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in found:
                owners.setdefault(id(p), []).append((module, name))
    weights = []
    for key, places in found.items():
        what, first = f"adapters[{places[0]}]", adapters[places[0]]
        if key not in owners:
            raise ValueError(f"{what}.weight is no parameter of model, whose layers compute with it: pass that one")
        factors = [Factors(f"adapters[{i}]", adapters[i].a, adapters[i].b, adapters[i].scale) for i in places]
        weights.append(AdaptedWeight(what, owners[key], first.fan_in_fan_out, factors=factors))
    return weights or _none_found()


def all_factors(model: nn.Module) -> list[Factors]:
    """The factors of all active adapters of ``model``, of layers of any kind.

    Raises:
        ValueError: there are none.
    """
    found = [
        f
        for name, layer in model.named_modules()
        if _is_adapted(layer)
        for f in _active_factors(f"layer {name!r}", layer)
    ]
    return found or _none_found()


def factor_pairs(name: str, given: nn.Module | Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """Factors that enter a model by their product: ``(a, b)`` of a model's adapters, or of those given, or pairs as given.

    ``name``: of the argument, for messages.

    Raises:
        ValueError: there are none.
        TypeError: one is no pair.
    """
    entries: list[Any] = list(all_factors(given) if isinstance(given, nn.Module) else given)
    if not entries:
        raise ValueError(f"{name} has no pair: pass [(x, y), ...], adapters, or a model that has some")
    pairs = []
    for i, entry in enumerate(entries):
        has_names = hasattr(entry, "a") and hasattr(entry, "b")
        pair = (entry.a, entry.b) if has_names else entry
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(p, Tensor) for p in pair):
            raise TypeError(f"pair {i} must be two tensors (x, y) or a samkern.Adapter, got {entry!r}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _none_found() -> Any:
    raise ValueError(
        "model has no adapters: no layer with lora_A, lora_B and scaling, as peft.get_peft_model() makes them; or pass "
        "adapters=[samkern.Adapter(...), ...]"
    )


def _is_adapted(layer: nn.Module) -> bool:
    has_base = isinstance(getattr(layer, "base_layer", None), nn.Module) or isinstance(
        layer._parameters.get("weight"), Tensor
    )
    if not has_base or not all(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling")):
        return False
    return not isinstance(layer.lora_A, nn.ModuleDict) or len(_both(layer, "A")) > 0


def _both(layer: nn.Module, factor: str) -> dict[str, Any]:
    """The factors of a layer of peft by the name of their adapter; those of embeddings are parameters."""
    return {**dict(getattr(layer, f"lora_{factor}")), **dict(getattr(layer, f"lora_embedding_{factor}", {}))}


def _active_factors(what: str, layer: Any) -> Iterator[Factors]:
    if not isinstance(layer.lora_A, nn.ModuleDict):
        yield Factors(what, _tensor(layer.lora_A), _tensor(layer.lora_B), layer.scaling)
        return
    all_a, all_b = _both(layer, "A"), _both(layer, "B")
    for name in layer.active_adapters:
        if name in all_a:
            yield Factors(f"{what}, adapter {name!r}", _tensor(all_a[name]), _tensor(all_b[name]), layer.scaling[name])


def _tensor(factor: Any) -> Tensor:
    found: Tensor = factor if isinstance(factor, Tensor) else factor.weight
    return found


def _check_adds_product(what: str, layer: Any) -> None:
    if getattr(layer, "merged", False):
        raise ValueError(f"{what}: its adapters are merged into the weight; call unmerge_adapter() first")
    if getattr(layer, "disable_adapters", False):
        raise ValueError(f"{what}: its adapters are disabled, and there is nothing to train; enable them")
    variants = getattr(layer, "lora_variant", {})
    for name in getattr(layer, "active_adapters", ()):
        if name in variants:
            kind = type(variants[name]).__name__
            raise TypeError(
                f"{what}: adapter {name!r} is a {kind}, whose layer does not compute with W + scale B A; use plain LoRA "
                "(use_dora=False)"
            )


def _check_shapes(what: str, rows: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or b.shape[1] != a.shape[0] or rows.shape != (b.shape[0], a.shape[1]):
        raise ValueError(
            f"{what}: b @ a must have the shape of the weight, {tuple(rows.shape)}, got b {tuple(b.shape)} and a "
            f"{tuple(a.shape)}; fan_in_fan_out=True is for weights [d_in, d_out]"
        )


def _rows(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t() if transposed and weight.dim() == 2 else weight


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, max(1, _CHUNK // max(1, rows.shape[1])))
