"""The global random numbers of a model's forward pass, wound back so that two passes draw the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SharedRng:
    """Records the generators that a forward over ``params`` may use: the CPU's, and that of each of their devices."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        devices = {p.device for p in params if p.device.type != "cpu"}
        self._cpu = torch.get_rng_state()
        self._others = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def rewind(self) -> None:
        """Puts the generators back to where they were recorded."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others.items():
            torch.get_device_module(device).set_rng_state(state, device)
