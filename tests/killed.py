"""A training that may be killed at any moment: it writes checkpoints and goes on from the last one. And how to kill it.

Trainings run in processes that a server forks: it has imported torch once, and has neither threads nor a pool of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from ctypes import c_int
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.atomic_save import atomic_save

from .cases import subject_named
from .methods import base_named
from .problems import Net, closure_for
from .ranks import PRELOADED

STEPS, EVERY = 24, 4  # a checkpoint after so many
CHECKPOINT, END = "checkpoint.pt", "end.pt"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Training:
    """``save``: how a checkpoint is written. ``part``: what a resumed run takes from it."""

    method: str
    base: str
    save: Callable[[Any, Path], None] = atomic_save
    parts: tuple[str, ...] = ("net", "opt", "random")


class NoisyNet(Net):
    """Its passes draw random numbers, which a checkpoint has to go on with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def run(training: Training, folder: Path, place: Any) -> None:
    """Trains to the end. ``place.value`` counts passes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = NoisyNet().double()
    subject = subject_named(training.method)
    opt = subject.method.make(net.parameters(), base_named(training.base), model=net)
    start, path = 0, folder / CHECKPOINT
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        start = checkpoint["step"]
        take = {"net": net.load_state_dict, "opt": opt.load_state_dict, "random": torch.set_rng_state}
        for part in training.parts:
            take[part](checkpoint[part])

    def counted(closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            place.value += 1
            return closure()

        return run

    for t in range(start, STEPS):
        opt.step(counted(closure_for(net, t, opt.zero_grad)))
        if (t + 1) % EVERY == 0:
            state = {"step": t + 1, "net": net.state_dict(), "opt": opt.state_dict(), "random": torch.get_rng_state()}
            # Something large, so that a file takes some time.
            training.save({**state, "ballast": torch.zeros(1 << 20)}, path)
    atomic_save({"net": net.state_dict(), "opt": opt.state_dict(), "random": torch.get_rng_state()}, folder / END)


class Child:
    """A process that trains."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.folder = folder
        self.place = SERVER.RawValue(c_int)
        self.process = SERVER.Process(target=run, args=(training, folder, self.place), daemon=True)
        self.process.start()

    def kill_when(self, it_is_time: Callable[[Child], bool]) -> bool:
        """Whether it came to that; else the training has ended."""
        deadline = time.monotonic() + 60
        while self.process.is_alive():
            if it_is_time(self):
                os.kill(self.process.pid, signal.SIGKILL)
                break
            assert time.monotonic() < deadline, "the training hangs"
            time.sleep(1e-4)
        self.process.join()
        assert self.process.exitcode in (0, -signal.SIGKILL), self.process.exitcode
        return self.process.exitcode != 0

    def finish(self) -> dict[str, Any]:
        """What it ends with."""
        assert not self.kill_when(lambda child: False)
        return torch.load(self.folder / END, weights_only=True)

    def is_writing(self) -> bool:
        """Whether there is a part of a checkpoint that is not complete."""
        try:
            return (self.folder / f"{CHECKPOINT}.{self.process.pid}").stat().st_size > 0
        except FileNotFoundError:  # not begun, or complete by now
            return False
