"""An optimizer around another: one set of param groups and state, so that schedulers and checkpoints work on either."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

Groups = list[dict[str, Any]]


def name_in_groups(name: str, taken: Container[str]) -> str:
    """What our option ``name`` is called in groups of a base whose options are ``taken``."""
    return f"sam_{name}" if name in taken else name


class OptimizerAround(Optimizer):
    """Shares ``base``'s param groups and state, and adds options of its own to the groups.

    An option whose name the base uses for something else (``rho`` of Adadelta, ``alpha`` of RMSprop) is called ``sam_``
    and its name in the groups.
    """

    base: Optimizer

    def __init__(self, base: Optimizer, options: Mapping[str, Any], not_per_group: Sequence[str]) -> None:
        self.base = base
        self._not_per_group = tuple(name for name in not_per_group if name not in base.defaults)
        self._keys = {name: name_in_groups(name, base.defaults) for name in options}
        ours = {self._keys[name]: value for name, value in options.items()}
        # torch's __init__ would make groups and state of its own; its __setstate__ makes the rest of an Optimizer.
        self.__setstate__({"defaults": {**base.defaults, **ours}})
        for i, group in enumerate(base.param_groups):
            self._check_options({**ours, **group}, i)
        for group in base.param_groups:
            self._complete(group, ours)

    @abstractmethod
    def check_group(self, options: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if an option of a group is out of range."""

    @abstractmethod
    def require_idle(self, what: str) -> None:
        """Raises ``RuntimeError`` if ``what`` is not possible now, because a step is under way."""

    # ---- groups and state

    @property
    def param_groups(self) -> Groups:
        """The base's param groups, with our options in them."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: Groups) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def base_optimizer(self) -> Optimizer:
        """``base``, under the name that other SAM classes give it."""
        return self.base

    def options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Our options of a group, by their plain names."""
        # The base's own load_state_dict may have put groups in place that never had them.
        return {name: group.get(key, self.defaults[key]) for name, key in self._keys.items()}

    def key(self, name: str) -> str:
        """What our option ``name`` is called in the groups."""
        return self._keys[name]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the new group may override our options. Between the two halves of a step it raises."""
        self.require_idle("add_param_group()")
        self._check_options({**self.defaults, **param_group}, len(self.param_groups))
        self.base.add_param_group(param_group)
        self._complete(param_group, {key: self.defaults[key] for key in self._keys.values()})

    def _check_options(self, group: Mapping[str, Any], index: int) -> None:
        for name in self._not_per_group:
            if name in group:
                raise ValueError(f"group {index} sets {name}, which is one for all groups; pass it to the constructor")
        try:
            self.check_group(self.options(group))
        except ValueError as error:
            raise ValueError(f"group {index}: {error}") from None

    def _complete(self, group: dict[str, Any], options: Mapping[str, Any]) -> None:
        for key, value in options.items():
            group.setdefault(key, value)

    # ---- checkpoints: torch's own format for the base, and one more entry for what is ours

    def base_state_dict(self) -> dict[str, Any]:
        """The base's part of a checkpoint."""
        return self.base.state_dict()

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """What we keep between steps, as plain values and tensors; parameters by their index."""

    @abstractmethod
    def check_own_state(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if ``load_own_state`` could not take it."""

    @abstractmethod
    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Takes what ``own_state`` gave; an empty mapping (the base's own checkpoint) means a fresh start."""

    def state_dict(self) -> dict[str, Any]:
        """The base's ``state_dict`` with one more entry, "samkern": the plain base optimizer loads it too.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``, when weights are perturbed.
        """
        self.require_idle("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.base_state_dict()
        state_dict["samkern"] = self.own_state()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues bit-exactly from ``state_dict``: ours, or that of the plain base optimizer (ours then starts fresh).

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``.
            ValueError: it belongs to other parameters. Nothing has been loaded then.
        """
        self.require_idle("load_state_dict()")
        loaded: dict[str, Any] = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            loaded = hook(self, loaded) or loaded
        ours = loaded.pop("samkern", {})
        self.check_own_state(ours)
        options = [{key: group[key] for key in self._keys.values()} for group in self.param_groups]
        self.base.load_state_dict(loaded)
        for group, before in zip(self.param_groups, options, strict=True):
            self._complete(group, before)
        self.restore_precision(loaded)
        self.load_own_state(ours)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def restore_precision(self, state_dict: Mapping[str, Any]) -> None:
        """Puts back float32 state that torch's loading has cast to the dtype of half-precision parameters."""

    # ---- wrappers, pickle and deepcopy

    @property
    def is_itself(self) -> bool:
        """False for a wrapper that takes our class for its own and leaves the attributes to what it wraps (Lightning's)."""
        return "base" in vars(self)

    def __getstate__(self) -> dict[str, Any]:
        self.require_idle("copying or pickling the optimizer")
        return {name: value for name, value in self.__dict__.items() if self.is_persistent(name)}

    @classmethod
    def is_persistent(cls, name: str) -> bool:
        """Whether pickle and deepcopy take this attribute along."""
        # Hooks and what torch's schedulers patch in stay with the instance, as with torch's own optimizers.
        return not name.startswith("_optimizer_") and name not in ("step", "_opt_called", "_zero_grad_profile_name")
