"""kill -9 in the middle of a training, then on from the last checkpoint: the end is that of an unbroken run, bit by bit."""

from __future__ import annotations

import random
import time

import pytest
import torch

from .killed import CHECKPOINT, EVERY, STEPS, Child, Training
from .lists import same_tree

TRAININGS = [
    ("SAM", "momentum"),
    ("SAM", "AdamW"),
    ("LookSAM", "momentum"),
    ("LookSAM", "own_step"),
    ("SSAMF_batch", "AdamW"),
    ("ARSAM", "Nesterov"),
    ("ARSAM", "Adam"),
    ("AESAM", "momentum"),
    ("RST", "AdamW"),
    ("AELookSAM", "own_step"),
    ("MSAM", "momentum"),
]


def at_pass(n, delay):
    """Some time into pass ``n`` of this process."""

    def it_is_time(child):
        if child.place.value < n:
            return False
        time.sleep(delay)
        return True

    return it_is_time


def while_writing(child):
    return child.is_writing()


@pytest.mark.parametrize(("method", "base"), TRAININGS)
def test_goes_on_bit_exactly(method, base, tmp_path):
    training, chance = Training(method, base), random.Random(f"{method} {base}")
    unbroken = Child(training, tmp_path / "unbroken")
    # Passes differ in length: a delay of up to 2 ms falls into one, into an update or between them.
    moments = [at_pass(chance.randint(1, EVERY), 0.0), while_writing]
    moments += [at_pass(chance.randint(1, STEPS // 2), 0.002 * chance.random()) for _ in range(2)]
    chance.shuffle(moments)
    folder = tmp_path / "killed"
    kills = sum(Child(training, folder).kill_when(moment) for moment in moments)
    end = Child(training, folder).finish()
    assert kills >= 2
    assert list(folder.glob(f"{CHECKPOINT}.*")), "no kill has met a checkpoint while it was written"
    assert same_tree(end, unbroken.finish())


def test_a_checkpoint_that_is_not_atomic_is_lost(tmp_path):
    """What the test above would see otherwise."""
    tmp_path.joinpath("x").mkdir()
    training = Training("SAM", "momentum", save=torch.save)
    path = tmp_path / "x" / CHECKPOINT

    def half_written(child):
        return path.exists() and path.stat().st_size > 0

    assert Child(training, tmp_path / "x").kill_when(half_written)
    with pytest.raises((RuntimeError, OSError)):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("forgotten", ["opt", "random"])
def test_what_is_not_taken_from_a_checkpoint_shows(forgotten, tmp_path):
    parts = {"net", "opt", "random"} - {forgotten}
    training = Training("LookSAM", "momentum", parts=tuple(parts))
    unbroken = Child(training, tmp_path / "unbroken")
    assert Child(training, tmp_path / "killed").kill_when(at_pass(2 * EVERY, 0.0))
    end = Child(training, tmp_path / "killed").finish()
    assert not same_tree(end, unbroken.finish())
