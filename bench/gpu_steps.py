"""Half-steps on a GPU: ours on every backend against _foreach chains and an eager loop. `python -m bench.gpu_steps`.

GPU time is taken with events around many steps in a row, gradients put in place beforehand and kept (``zero_grad`` is not
part of it); enqueue time by the host's clock over the same calls. Candidates take turns round by round. The copy rate comes
from the same rounds. With ``--device cpu`` it only proves that it runs.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import samkern
from samkern.backends import resolve

from . import peers, shapes
from .harness import RESULTS, device_name

BYTES = 44  # of a SAM step per parameter, fp32, with the check of the second gradient


def folder(device: torch.device) -> Path:
    """Where the results of this machine are."""
    name = torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else device_name()
    return RESULTS / name


def steppers(make: Callable[[], list[torch.Tensor]]) -> list[peers.Ours]:
    """Ours on each backend that serves the tensors, then the peers, each on weights of its own."""
    serving = [name for name in ("cuda", "triton", "cpu") if serves(name, make()[0].device)]
    made = []
    for name in serving:
        ours = peers.Ours(make(), backend=name)
        ours.name = name
        made.append(ours)
    return [*made, peers.ForeachChain(make()), peers.EagerLoop(make())]


def serves(name: str, device: torch.device) -> bool:
    """Whether a backend can run on the device."""
    try:
        return samkern.backends()[name].available and resolve(device, name) == name
    except (ValueError, samkern.NotBuiltError):
        return False


class Timer:
    """Seconds that ``run`` takes on the device, and that its call takes on the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def __call__(self, run: Callable[[], None], repeats: int) -> tuple[float, float]:
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            spent = (time.perf_counter() - start) / repeats
            return spent, spent
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        enqueued = (time.perf_counter() - start) / repeats
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats, enqueued


def measure(shape_set: shapes.ShapeSet, device: torch.device, rounds: int, repeats: int) -> list[dict[str, object]]:
    """One row per candidate."""
    randn = functools.partial(torch.randn, device=device)
    torch.manual_seed(0)
    w, g, g_s = shape_set.tensors(randn), shape_set.tensors(randn), shape_set.tensors(randn)
    source = torch.randn(shape_set.n_params, device=device)
    target, timer = torch.empty_like(source), Timer(device)
    candidates = steppers(lambda: [x.clone() for x in w])

    def step(stepper: peers.Ours) -> None:
        for p, grad in zip(stepper.params, g, strict=True):
            p.grad = grad
        stepper.first()
        for p, grad in zip(stepper.params, g_s, strict=True):
            p.grad = grad
        stepper.second()

    spent: list[list[tuple[float, float]]] = [[] for _ in candidates]
    copies = []
    for turn in range(rounds + 1):
        copies.append(timer(lambda: target.copy_(source), repeats)[0])
        for k in range(len(candidates)):
            i = (k + turn) % len(candidates)
            spent[i].append(timer(functools.partial(step, candidates[i]), repeats))
    copy_rate = 8 * shape_set.n_params / statistics.median(copies[1:]) / 1e9
    rows = []
    for stepper, times in zip(candidates, spent, strict=True):
        seconds, enqueued = (statistics.median(x) for x in zip(*times[1:], strict=True))
        rate = BYTES * shape_set.n_params / seconds / 1e9
        rows.append(
            {
                "measured": "SAM step",
                "backend": stepper.name,
                "shape_set": shape_set.name,
                "n_tensors": shape_set.n_tensors,
                "n_params": shape_set.n_params,
                "p50_us": round(seconds * 1e6, 1),
                "enqueue_us": round(enqueued * 1e6, 1),
                "gbps": round(rate, 1),
                "copy_gbps": round(copy_rate, 1),
                "pct_copy": round(100 * rate / copy_rate, 1),
                "torch": torch.__version__,
                "samkern": samkern.__version__,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures all shape sets, prints a table and appends it to ``steps.csv`` in the machine's folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=20, help="steps in a row")
    parser.add_argument("--sets", nargs="*", default=[s.name for s in shapes.ALL])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rows = []
    for shape_set in shapes.ALL:
        if shape_set.name in options.sets:
            rows += measure(shape_set, device, options.rounds, options.repeats)
    for row in rows:
        print(
            "{shape_set:<13}{backend:<22}{p50_us:>10.1f} us{enqueue_us:>10.1f} us{pct_copy:>7.1f} % of copy".format(
                **row
            )
        )
    path = (options.out or folder(device)) / "steps.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
