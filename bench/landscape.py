"""How long a landscape of the demo's net takes: 25 x 25 points over its 1,200 training images.

``python -m bench.landscape [--parallel 1 5 10] [--batch 1200]`` computes as many points at once as each number says, a few
first to compare them, then the whole landscape with the fastest, and prints seconds. All must agree on the losses.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from samkern import landscape
from samkern.demo.study import Digits, load, make_net

BAR = 60.0  # seconds on 2 cores
SIDE = 25


def seconds(
    net: torch.nn.Module, digits: Digits, batch: int, side: int, parallel: int
) -> tuple[float, float, np.ndarray]:
    """Of the clock, and of one processor in all threads; and the losses."""
    data = list(zip(digits.train_x.split(batch), digits.train_y.split(batch), strict=True))
    begin, spent = time.perf_counter(), time.process_time()
    found = landscape.surface(net, cross_entropy, data, points=side, parallel=parallel, progress=False)
    return time.perf_counter() - begin, time.process_time() - spent, found.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 5, 10], help="points at once")
    parser.add_argument("--batch", type=int, default=1200, help="images at once")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    digits, net = load(0.2, 0), make_net(0).to(args.device)
    seconds(net, digits, args.batch, 3, 1)  # warms up
    taken, losses = {}, []
    for parallel in args.parallel:
        clock, spent, loss = seconds(net, digits, args.batch, 7, parallel)
        taken[parallel] = clock
        losses.append(loss)
        print(
            f"{parallel:3} at once: {1e3 * clock / 49:6.1f} ms a point, {1e3 * spent / 49:6.1f} ms of processor time",
            flush=True,
        )
    assert all(np.allclose(loss, losses[0], rtol=1e-4) for loss in losses), "losses differ"
    best = min(taken, key=taken.__getitem__)
    clock, spent, _ = seconds(net, digits, args.batch, SIDE, best)
    threads = f"{torch.get_num_threads()} threads, {args.device}"
    print(f"{SIDE} x {SIDE} points, {best} at once, {threads}: {clock:.1f} s ({spent:.1f} s of processor time)")
    print(f"{'meets' if clock < BAR else 'misses'} the bar: less than {BAR:.0f} s")


if __name__ == "__main__":
    main()
