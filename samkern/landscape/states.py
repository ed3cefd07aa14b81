"""Checkpoints, as they are given: state_dicts or lists of tensors, and what of them can be moved."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..reference import math_dtype
from ..undisturbed import unwrapped

State: TypeAlias = Mapping[str, Tensor] | Sequence[Tensor]
Named: TypeAlias = dict[str, Tensor]


def read_state(model: nn.Module, state: State, argument: str) -> tuple[Named, Named]:
    """All parameters and floating-point buffers of a checkpoint, by the model's names, in float32 or float64, on its device.

    A list has the parameters that require a gradient; what a checkpoint has not is the model's own. ``model``: as the user
    has it, whose wrapper may put a prefix before the names of a state_dict.

    Raises:
        TypeError, ValueError: it does not fit the model; ``argument`` is the name of what was given.
    """
    inner = unwrapped(model)
    own_params: Named = dict(inner.named_parameters())
    own_buffers = {name: x for name, x in inner.named_buffers() if x.is_floating_point()}
    if isinstance(state, Mapping):
        given = _of_state_dict(model, inner, state, argument)
    else:
        given = as_list({name: p for name, p in own_params.items() if p.requires_grad}, state, argument)
    return (
        _fitted({**own_params, **{name: x for name, x in given.items() if name in own_params}}, own_params, argument),
        _fitted(
            {**own_buffers, **{name: x for name, x in given.items() if name in own_buffers}}, own_buffers, argument
        ),
    )


def _of_state_dict(model: nn.Module, inner: nn.Module, state: Mapping[str, Tensor], argument: str) -> Named:
    own, outer = list(inner.state_dict()), list(model.state_dict())
    if outer != own and not set(own) & set(state):
        renamed = dict(zip(outer, own, strict=True))
        state = {renamed.get(name, name): x for name, x in state.items()}
    unknown = [name for name in state if name not in own]
    if unknown:
        raise ValueError(f"{argument} has {_names(unknown)}, which the model has not: give a state_dict of this model")
    # A tied tensor has several names; a file may have kept one of them.
    aliases: dict[int, list[str]] = {}
    both = (inner.named_parameters(remove_duplicate=False), inner.named_buffers(remove_duplicate=False))
    for name, x in itertools.chain(*both):
        aliases.setdefault(id(x), []).append(name)
    given, missing = {}, []
    for name, x in itertools.chain(inner.named_parameters(), inner.named_buffers()):
        found = next((state[alias] for alias in aliases[id(x)] if alias in state), None)
        if found is not None:
            given[name] = found
        elif name in own:  # not all buffers are saved
            missing.append(name)
    if missing:
        raise ValueError(f"{argument} lacks {_names(missing)}: give a whole state_dict, or a list of tensors")
    return given


def _fitted(given: Named, own: Named, argument: str) -> Named:
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{argument}: {name} must be a tensor, got {type(x).__name__}")
        if x.shape != own[name].shape:
            raise ValueError(
                f"{argument}: {name} has shape {tuple(x.shape)}, the model's {tuple(own[name].shape)}: give tensors "
                "of this model's shapes"
            )
    return {name: x.detach().to(own[name].device, math_dtype(own[name].dtype)) for name, x in given.items()}


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def as_list(own: Named, given: Sequence[Tensor], argument: str) -> Named:
    """Tensors of the user's, one for each of ``own``, by its names.

    Raises:
        TypeError, ValueError: they are something else.
    """
    if isinstance(given, (Tensor, str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"{argument} must be a list of tensors or a state_dict, got {type(given).__name__}")
    if len(given) != len(own):
        raise ValueError(
            f"{argument} has {len(given)} tensors, the model {len(own)} parameters that require a gradient: give one for each"
        )
    return _fitted(dict(zip(own, given, strict=True)), own, argument)


def differences(state: Named, origin: Named) -> Named:
    """What leads from ``origin`` to ``state``, of the parameters that both have."""
    return {name: state[name] - x for name, x in origin.items()}


def dot(x: Named, y: Named) -> float:
    """Of whole vectors, in float64."""
    parts = [torch.dot(a.double().flatten(), y[name].double().flatten()) for name, a in x.items()]
    return float(torch.stack(parts).sum())
