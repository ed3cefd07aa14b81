"""Averages of weights from stored snapshots, two passes over them. Nothing of samkern in here."""

from __future__ import annotations

import math

import torch


def mean(snapshots):
    """Of each tensor, over all snapshots (lists of tensors), in float64."""
    return [torch.stack([x.double() for x in of_one]).mean(0) for of_one in zip(*snapshots, strict=True)]


def ema(snapshots, decay, warmup=False):
    """``b avg + (1 - b) w``, from the first snapshot on; the m-th has ``b = min(decay, (1 + m) / (10 + m))`` with warm-up."""
    averages = [x.double() for x in snapshots[0]]
    for m, snapshot in enumerate(snapshots[1:], 1):
        b = min(decay, (1 + m) / (10 + m)) if warmup else decay
        averages = [b * average + (1 - b) * x.double() for average, x in zip(averages, snapshot, strict=True)]
    return averages


def swad(losses, n_converge, n_tolerance, ratio):
    """Which segments are averaged, whether a valley started, and at which validation it is known to have ended, if it is."""
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    starts = [
        i
        for i in range(len(losses) - n_converge + 1)
        if losses[i] == min(losses[i : i + n_converge]) and max(losses[i : i + n_converge]) < math.inf
    ]
    if not starts:
        return [len(losses) - 1], False, None
    start = starts[0]
    threshold = (1 + ratio) * sum(losses[start : start + n_converge]) / n_converge
    chosen = [start]
    for e in range(start + 1, len(losses)):
        known = losses[e : e + n_tolerance]
        if min(known) > threshold:
            last_needed = max(e + n_tolerance - 1, start + n_converge - 1)
            return chosen, True, last_needed if last_needed < len(losses) else None
        chosen.append(e)
    return chosen, True, None
