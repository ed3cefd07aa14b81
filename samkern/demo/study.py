"""The study: handwritten digits with wrong labels, a small convolutional net, and the methods that are compared on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from ..fisher import SampleLosses
from ..optim import ASAM, SAM, SSAMD, SSAMF, LookLayerSAM, LookSAM, SAMk
from ..sharpness import top_eigenvalue

N_TRAIN, BATCH = 1200, 64
BASE: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}


class Task(NamedTuple):
    """What an optimizer may want to know of a run: the training data and the number of steps."""

    x: Tensor
    y: Tensor
    n_steps: int


@dataclass(frozen=True)
class Entry:
    """A row of the table. ``longer``: factor on the epochs. ``in_quick``: whether the short form has it too."""

    name: str
    make: Callable[[nn.Module, Task], Optimizer]
    longer: int = 1
    in_quick: bool = True


def _around(method: type, **options: Any) -> Callable[[nn.Module, Task], Optimizer]:
    return lambda model, _: method(model.parameters(), SGD, model=model, **options, **BASE)


def _sgd(model: nn.Module, _: Task) -> Optimizer:
    return SGD(model.parameters(), **BASE)


def _ssam_f(model: nn.Module, task: Task) -> Optimizer:
    losses = SampleLosses(model, functional.cross_entropy, (task.x, task.y), num_samples=256)
    interval = 5 * (N_TRAIN // BATCH + 1)  # five epochs
    return SSAMF(model.parameters(), SGD, rho=0.3, sample_losses=losses, refresh_interval=interval, model=model, **BASE)


def _ssam_d(model: nn.Module, task: Task) -> Optimizer:
    interval = 5 * (N_TRAIN // BATCH + 1)
    options: dict[str, Any] = {"total_steps": task.n_steps, "refresh_interval": interval}
    return SSAMD(model.parameters(), SGD, rho=0.4, model=model, **options, **BASE)


ENTRIES: tuple[Entry, ...] = (
    Entry("SGD", _sgd),
    Entry("SGD, twice the epochs", _sgd, longer=2, in_quick=False),
    Entry("SAM (rho 0.2)", _around(SAM, rho=0.2)),
    Entry("ASAM (rho 2, eta 0.01)", _around(ASAM, rho=2.0), in_quick=False),
    Entry("SAM-k (k 5)", _around(SAMk, rho=0.2, k=5)),
    Entry("LookSAM (k 2)", _around(LookSAM, rho=0.2, k=2)),
    Entry("LookSAM (k 5)", _around(LookSAM, rho=0.2, k=5)),
    Entry("SSAM-F (rho 0.3, half)", _ssam_f),
    Entry("SSAM-D (rho 0.4, half)", _ssam_d, in_quick=False),
    Entry("Look-LayerSAM (rho 0.02, k 5)", _around(LookLayerSAM, rho=0.02, k=5), in_quick=False),
)


@dataclass(frozen=True)
class Setting:
    """What is varied: share of wrong training labels, passes over the data, one run per seed, and the methods."""

    noise: float
    epochs: int
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...] = ENTRIES


@dataclass
class Run:
    """One training run. ``curve``: forward-backward pairs so far and test accuracy in per cent, after every epoch."""

    seed: int
    test_accuracy: float
    train_accuracy: float
    eigenvalue: float
    pairs: int
    steps: int
    curve: list[tuple[int, float]]


@dataclass
class Row:
    """All runs of an entry, and what a step of it takes: median seconds, and the optimizer's own share of them."""

    entry: Entry
    runs: list[Run] = field(default_factory=list)
    seconds_per_step: float = 0.0
    own_share: float = 0.0

    @property
    def pairs_per_step(self) -> float:
        """Forward-backward pairs that a step costs on average."""
        return sum(run.pairs for run in self.runs) / sum(run.steps for run in self.runs)


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in [0, 1]; ``train_y`` with wrong labels, ``test_y`` as they are."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(noise: float, seed: int) -> Digits:
    """scikit-learn's 1,797 handwritten digits: 1,200 to train on, the rest to test. ``noise`` of the labels are wrong."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))  # the same split for every seed
    x, y = x[order], y[order]
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(N_TRAIN, generator=generator)[: round(noise * N_TRAIN)]
    train_y = y[:N_TRAIN].clone()
    train_y[wrong] = (train_y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return Digits(x[:N_TRAIN], train_y, x[N_TRAIN:], y[N_TRAIN:])


def make_net(seed: int) -> nn.Sequential:
    """Three convolutions with BatchNorm, global pooling, a linear classifier: 10,978 parameters."""

    def block(n_in: int, n_out: int) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
        return nn.Sequential(*block(1, 24), *block(24, 24), nn.MaxPool2d(2), *block(24, 24), *pooled)


def closure_for(net: nn.Module, opt: Optimizer, x: Tensor, y: Tensor) -> Callable[[], float]:
    """Zeroes the gradients, computes the loss, calls backward, returns the loss."""

    def closure() -> float:
        opt.zero_grad()
        loss = functional.cross_entropy(net(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return closure


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers in per cent, in evaluation mode."""
    net.eval()
    right: float = (net(x).argmax(1) == y).double().mean().item() * 100
    net.train()
    return right


def train(entry: Entry, setting: Setting, seed: int, progress: tqdm[Any]) -> Run:
    """One run: SGD-momentum with cosine decay as the base, batches in an order that depends on the seed alone."""
    data, net = load(setting.noise, seed), make_net(seed)
    epochs = setting.epochs * entry.longer
    n_steps = epochs * (N_TRAIN // BATCH + 1)
    opt = entry.make(net, Task(data.train_x, data.train_y, n_steps))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, n_steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    curve, steps = [], 0
    for _ in range(epochs):
        for indices in torch.split(torch.randperm(N_TRAIN, generator=generator), BATCH):
            opt.step(closure_for(net, opt, data.train_x[indices], data.train_y[indices]))
            schedule.step()
            steps += 1
        progress.update()
        curve.append((getattr(opt, "evaluations", steps), accuracy(net, data.test_x, data.test_y)))
    thirds = (torch.split(part, N_TRAIN // 3) for part in (data.train_x, data.train_y))
    parts = list(zip(*thirds, strict=True))
    return Run(
        seed=seed,
        test_accuracy=curve[-1][1],
        train_accuracy=accuracy(net, data.train_x, data.train_y),
        eigenvalue=top_eigenvalue(net, functional.cross_entropy, parts, tol=1e-2),
        pairs=curve[-1][0],
        steps=steps,
        curve=curve,
    )


def time_steps(rows: list[Row], setting: Setting, rounds: int = 60, warm_up: int = 10) -> None:
    """Fills in what a step takes. The methods take turns step by step, so that a slow moment of the machine hits all.

    A method's mean step is the median over its steps of each kind (with and without a second pass), weighted as they occur
    in a run.
    """
    data = load(setting.noise, 0)
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    nets = [make_net(0) for _ in rows]
    task = Task(data.train_x, data.train_y, rounds)
    opts = [row.entry.make(net, task) for row, net in zip(rows, nets, strict=True)]
    whole: list[dict[int, list[float]]] = [{} for _ in rows]
    inside: list[dict[int, list[float]]] = [{} for _ in rows]
    for t in range(warm_up + rounds):
        for i, (net, opt) in enumerate(zip(nets, opts, strict=True)):
            closure = closure_for(net, opt, x, y)
            spent: list[float] = []

            def timed(closure: Callable[[], float] = closure, spent: list[float] = spent) -> float:
                start = time.perf_counter()
                loss = closure()
                spent.append(time.perf_counter() - start)
                return loss

            start = time.perf_counter()
            opt.step(timed)
            total = time.perf_counter() - start
            if t >= warm_up:
                whole[i].setdefault(len(spent), []).append(total)
                inside[i].setdefault(len(spent), []).append(sum(spent))
    for row, steps, closures in zip(rows, whole, inside, strict=True):
        row.seconds_per_step = _mean_of_medians(steps)
        row.own_share = 1 - _mean_of_medians(closures) / row.seconds_per_step


def _mean_of_medians(by_kind: dict[int, list[float]]) -> float:
    n = sum(map(len, by_kind.values()))
    return sum(statistics.median(values) * len(values) / n for values in by_kind.values())


@dataclass
class Result:
    """The whole study: its setting and one row per entry."""

    setting: Setting
    rows: list[Row]
    seconds: float


def run(setting: Setting) -> Result:
    """Every entry on every seed, with a progress bar over the epochs."""
    start = time.perf_counter()
    rows = [Row(entry) for entry in setting.entries]
    epochs = sum(entry.longer for entry in setting.entries) * len(setting.seeds) * setting.epochs
    with tqdm(total=epochs, unit="epoch", dynamic_ncols=True) as progress:
        for row in rows:
            for seed in setting.seeds:
                progress.set_description(f"{row.entry.name}, seed {seed}")
                row.runs.append(train(row.entry, setting, seed, progress))
        progress.set_description("timing")
        time_steps(rows, setting)
    return Result(setting, rows, time.perf_counter() - start)
