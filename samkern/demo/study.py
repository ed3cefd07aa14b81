"""The study: handwritten digits with wrong labels, a small convolutional net, and the methods that are compared on it."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from ..fisher import SampleLosses
from ..history import History
from ..landscape import surface
from ..losses import MESALoss, SAFLoss
from ..optim import (
    AESAM,
    ARSAM,
    ASAM,
    EMA,
    GRST,
    LETSSAM,
    LPFSGD,
    MSAM,
    RST,
    SAM,
    SSAMD,
    SSAMF,
    SWA,
    WASAM,
    AELookSAM,
    Bernoulli,
    LookLayerSAM,
    LookSAM,
    SAMk,
    SharpnessAware,
)
from ..optim.averaging import WeightAverage
from ..reestimate import update_bn
from ..reporting import RunFolder, slug
from ..sharpness import flatness, top_eigenvalue
from ..undisturbed import unchanged_buffers

N_TRAIN, BATCH = 1200, 64
# Beside the top eigenvalue, of every run on record; on a third of the training data.
MEASURES: dict[str, dict[str, Any]] = {
    "epsilon_sharpness": {},
    "adaptive_sharpness": {},
    "lpf": {"draws": 10},
    "fisher_rao": {},
}
LANDSCAPE_POINTS = 15  # along each direction
FIVE_EPOCHS = 5 * math.ceil(N_TRAIN / BATCH)  # in steps
BASE: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}


class Task(NamedTuple):
    """What an optimizer may want to know of a run: the model, the training data and the number of steps."""

    model: nn.Module
    x: Tensor
    y: Tensor
    n_steps: int


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    ``longer``: factor on the epochs. ``in_quick``: whether the short form has it too. ``held_out``: so many of the training
    samples, the last ones, are validation data of the method: it does not train on them. ``average``: of the weights, which
    is what is tested. ``reestimate``: the statistics of BatchNorm before tests; of an average always. ``loss``: in place of
    cross entropy. ``pictured``: whether the report shows the landscape where its first run has ended.
    """

    name: str
    make: Callable[[Task], Optimizer]
    longer: int = 1
    in_quick: bool = True
    held_out: int = 0
    average: Callable[[Task, Optimizer], WeightAverage] | None = None
    reestimate: bool = False
    loss: Callable[[Task, Optimizer], SAFLoss | MESALoss] | None = None
    pictured: bool = False


def around(method: type, **options: Any) -> Callable[[Task], Optimizer]:
    """``method`` around SGD. An option that is a function is called with the task first: choices have state of their own."""

    def make(task: Task) -> Optimizer:
        given = {name: value(task) if callable(value) else value for name, value in options.items()}
        opt: Optimizer = method(task.model.parameters(), SGD, model=task.model, **given, **BASE)
        return opt

    return make


def sgd(task: Task) -> Optimizer:
    """The base alone."""
    return SGD(task.model.parameters(), **BASE)


def n_steps(task: Task) -> int:
    """The length of the run, for methods that follow it."""
    return task.n_steps


def _fading(task: Task) -> Bernoulli:
    """Climbs on most steps at first and on hardly any at last, when it is the weights themselves that count."""
    return Bernoulli("cosine-down", total_steps=task.n_steps)


def _sample_losses(task: Task) -> SampleLosses:
    return SampleLosses(task.model, functional.cross_entropy, (task.x, task.y), num_samples=256)


def own_average(_: Task, opt: Optimizer) -> WeightAverage:
    """That of an optimizer which has one."""
    average: WeightAverage = opt.average  # type: ignore[attr-defined]
    return average


def ema(decay: float) -> Callable[[Task, Optimizer], WeightAverage]:
    """An exponential average."""
    return lambda _, opt: EMA(opt, decay)


def late_mean(start: float) -> Callable[[Task, Optimizer], WeightAverage]:
    """The mean of the weights after all steps from this share of them on."""
    return lambda task, opt: SWA(opt, start=round(start * task.n_steps))


def saf(**options: Any) -> Callable[[Task, Optimizer], SAFLoss]:
    """With an archive of the answers to all training samples."""
    return lambda task, _: SAFLoss(len(task.y), 10, **options)


def mesa(decay: float, **options: Any) -> Callable[[Task, Optimizer], MESALoss]:
    """With the answers of an exponential average."""
    return lambda task, opt: MESALoss(task.model, EMA(opt, decay), **options)


ENTRIES: tuple[Entry, ...] = (
    Entry("SGD", sgd, pictured=True),
    Entry("SGD, twice the epochs", sgd, longer=2, in_quick=False),
    Entry("SAM (rho 0.2)", around(SAM, rho=0.2), pictured=True),
    Entry("ASAM (rho 2, eta 0.01)", around(ASAM, rho=2.0), in_quick=False),
    Entry("SAM-k (k 5)", around(SAMk, rho=0.2, k=5)),
    Entry("LookSAM (k 2)", around(LookSAM, rho=0.2, k=2)),
    Entry("LookSAM (k 5)", around(LookSAM, rho=0.2, k=5), pictured=True),
    Entry(
        "SSAM-F (rho 0.3, half)",
        around(SSAMF, rho=0.3, sample_losses=_sample_losses, refresh_interval=FIVE_EPOCHS),
    ),
    Entry(
        "SSAM-D (rho 0.4, half)",
        around(SSAMD, rho=0.4, total_steps=n_steps, refresh_interval=FIVE_EPOCHS),
        in_quick=False,
    ),
    Entry("Look-LayerSAM (rho 0.02, k 5)", around(LookLayerSAM, rho=0.02, k=5), in_quick=False),
    # Settings of the rows below: bench/search.py, which looks at training data alone.
    Entry(
        "RST (rho 0.8, late half)",
        around(RST, rho=0.8, schedule="piecewise-1", total_steps=n_steps),
        in_quick=False,
    ),
    Entry("G-RST (rho 0.2, p 0.25)", around(GRST, rho=0.2, p=0.25, gamma="match"), in_quick=False),
    Entry("AE-SAM (rho 0.8)", around(AESAM, rho=0.8, total_steps=n_steps), in_quick=False),
    Entry("AE-LookSAM (rho 0.4, R1)", around(AELookSAM, rho=0.4, rule="R1", total_steps=n_steps), in_quick=False),
    Entry(
        "ARSAM (rho 0.2, at most 0.2)",
        around(ARSAM, rho=0.2, window=20, max_rate=0.2, beta=1.0, max_age=None),
        in_quick=False,
    ),
    Entry("LETS-SAM (rho from 0.2)", around(LETSSAM, rho=0.2), in_quick=False, held_out=100),
    Entry("MSAM (rho 1)", around(MSAM, rho=1.0), in_quick=False),
    Entry("MSAM (rho 2, fading)", around(MSAM, rho=2.0, schedule=_fading)),
    Entry(
        "LPF-SGD (std 0.02 to 0.08)",
        around(LPFSGD, std=0.02, inc=4.0, draws=1, total_steps=n_steps),
        in_quick=False,
        reestimate=True,
    ),
    Entry("SGD, EMA (0.998)", sgd, in_quick=False, average=ema(0.998)),
    Entry("WASAM (rho 0.2)", around(WASAM, rho=0.2, total_steps=n_steps), in_quick=False, average=own_average),
    Entry("SAF (lam 3)", sgd, in_quick=False, loss=saf(lam=3.0, start_epoch=5, lag=3)),
    Entry("MESA (lam 3)", sgd, in_quick=False, loss=mesa(0.99, lam=3.0, start_epoch=5)),
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
    """One training run.

    ``kinds``: how many steps took how many forward-backward pairs. ``curve``: pairs so far and test accuracy in per cent,
    after every second epoch. ``folder``: where it is on record.
    """

    seed: int
    test_accuracy: float
    train_accuracy: float
    eigenvalue: float
    kinds: Counter[int]
    curve: list[tuple[int, float]]
    folder: Path | None = None

    @property
    def pairs(self) -> int:
        """Forward-backward pairs in all."""
        return sum(pairs * steps for pairs, steps in self.kinds.items())


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
        return sum(run.pairs for run in self.runs) / self.kinds.total()

    @property
    def kinds(self) -> Counter[int]:
        """How many steps of all runs took how many pairs."""
        return sum((run.kinds for run in self.runs), Counter())


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


@torch.no_grad()
def score(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss, and share of right answers in per cent, in evaluation mode."""
    net.eval()
    answers = net(x)
    net.train()
    right: float = (answers.argmax(1) == y).double().mean().item() * 100
    return functional.cross_entropy(answers, y).item(), right


class Fit:
    """Training of a net: SGD-momentum with cosine decay as the base, batches in an order that depends on the seed alone.

    ``kinds`` counts steps by the forward-backward pairs that they took; ``seconds`` are those in steps; ``losses`` has that of
    the first pass of each step.
    """

    def __init__(self, entry: Entry, net: nn.Module, data: Digits, epochs: int, seed: int) -> None:
        n = len(data.train_y) - entry.held_out
        self._x, self._y = data.train_x[:n], data.train_y[:n]
        self._val = (data.train_x[n:], data.train_y[n:]) if entry.held_out else None
        self._net, self.epochs = net, epochs
        n_steps = epochs * math.ceil(n / BATCH)
        task = Task(net, self._x, self._y, n_steps)
        self.opt = entry.make(task)
        self._reestimate = entry.reestimate
        self._average = entry.average(task, self.opt) if entry.average is not None else None
        self._loss = entry.loss(task, self.opt) if entry.loss is not None else None
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, n_steps)
        self._generator = torch.Generator().manual_seed(1000 + seed)
        self.kinds: Counter[int] = Counter()
        self.seconds = 0.0
        self.losses: list[float] = []

    def run(self, history: History | None = None) -> Iterator[int]:
        """Trains, and yields the pairs so far after every epoch."""
        for epoch in range(self.epochs):
            if self._loss is not None:
                self._loss.epoch = epoch
            for indices in torch.split(torch.randperm(len(self._y), generator=self._generator), BATCH):
                self.step(indices)
                if history is not None:
                    history.record()
            yield sum(pairs * steps for pairs, steps in self.kinds.items())

    def step(self, indices: Tensor) -> tuple[float, list[float]]:
        """One step on these samples. Returns the seconds that it took, and those of each forward-backward pair in it."""
        spent: list[float] = []
        options = {"val_closure": self._closure(*self._val, spent)} if self._val is not None else {}
        closure = self._closure(self._x[indices], self._y[indices], spent, indices)
        start = time.perf_counter()
        self.opt.step(closure, **options)
        seconds = time.perf_counter() - start
        self._schedule.step()
        self.kinds[len(spent)] += 1
        self.seconds += seconds
        return seconds, spent

    @contextlib.contextmanager
    def tested(self) -> Iterator[None]:
        """In the block, the net is what the method has to show: with an average of its weights, new statistics of BatchNorm."""
        if self._average is None and not self._reestimate:
            yield
            return
        with unchanged_buffers(self._net) if self._average is None else self._average.swapped(self._net):
            update_bn(self._net, torch.split(self._x, BATCH))
            yield

    def _closure(self, x: Tensor, y: Tensor, spent: list[float], indices: Tensor | None = None) -> Callable[[], float]:
        """Zeroes the gradients, computes the loss, calls backward, returns the loss; notes what that took."""

        def closure() -> float:
            start = time.perf_counter()
            self.opt.zero_grad()
            logits = self._net(x)
            if isinstance(self._loss, SAFLoss) and indices is not None:
                loss = self._loss(logits, y, indices)
            elif isinstance(self._loss, MESALoss):
                loss = self._loss(logits, y, x)
            else:
                loss = functional.cross_entropy(logits, y)
            loss.backward()  # type: ignore[no-untyped-call]
            value = loss.item()
            if indices is not None and not spent:
                self.losses.append(value)
            spent.append(time.perf_counter() - start)
            return value

        return closure


def train(entry: Entry, setting: Setting, seed: int, progress: tqdm[Any], runs: Path | None = None) -> Run:
    """One run, tested after every second epoch and the last. ``runs``: a folder for its ``RunFolder``."""
    data, net = load(setting.noise, seed), make_net(seed)
    fit = Fit(entry, net, data, setting.epochs * entry.longer, seed)
    folder = run_folder(entry, setting, seed, runs) if runs is not None else None
    on_record = folder is not None and isinstance(fit.opt, SharpnessAware)
    curve = []
    with folder.history(fit.opt) if on_record else contextlib.nullcontext() as history:  # type: ignore[union-attr, arg-type]
        for epoch, pairs in enumerate(fit.run(history), 1):
            progress.update()
            found: dict[str, float] = {}
            if epoch % 2 == 0 or epoch == fit.epochs:
                with fit.tested():
                    found["test_loss"], found["test_accuracy"] = score(net, data.test_x, data.test_y)
                    if epoch % 8 == 0 or epoch == fit.epochs:
                        _, found["train_accuracy"] = score(net, data.train_x, data.train_y)
                curve.append((pairs, found["test_accuracy"]))
            if folder is not None:
                steps = fit.kinds.total()
                found["train_loss"] = statistics.fmean(fit.losses[-steps // epoch :])
                folder.epoch(epoch, steps=steps, pairs=pairs, seconds=fit.seconds, **found)
    with fit.tested():
        eigenvalue = top_eigenvalue(net, functional.cross_entropy, [third_of(data)], tol=1e-2, progress=False)
        if folder is not None:
            folder.measure("top eigenvalue", eigenvalue)
            look_around(
                folder, net, third_of(data), entry.name if entry.pictured and seed == setting.seeds[0] else None
            )
    return Run(
        seed=seed,
        test_accuracy=curve[-1][1],
        train_accuracy=found["train_accuracy"],
        eigenvalue=float(eigenvalue),
        kinds=fit.kinds,
        curve=curve,
        folder=None if folder is None else folder.path,
    )


def run_folder(entry: Entry, setting: Setting, seed: int, runs: Path) -> RunFolder:
    """Where a run is on record, in place of an earlier one."""
    settings = {"epochs": setting.epochs * entry.longer, "wrong labels": setting.noise, "batch": BATCH, **BASE}
    path = runs / f"{slug(entry.name)}-seed{seed}"
    return RunFolder(path, method=entry.name, seed=seed, settings=settings, resume=False)


def look_around(folder: RunFolder, net: nn.Module, data: tuple[Tensor, Tensor], title: str | None) -> None:
    """Notes how flat the loss is, and with a title what its landscape looks like."""
    batches = list(zip(*(torch.split(part, 100) for part in data), strict=True))
    found = flatness(net, functional.cross_entropy, batches, MEASURES, progress=False)
    folder.measures({name.replace("_", " "): value for name, value in found.items()})
    if title is not None:
        options: dict[str, Any] = {"points": LANDSCAPE_POINTS, "title": title, "progress": False}
        folder.landscape(surface(net, functional.cross_entropy, [data], **options))


def third_of(data: Digits) -> tuple[Tensor, Tensor]:
    """Of the training data, which the curvature is that of."""
    return data.train_x[: N_TRAIN // 3], data.train_y[: N_TRAIN // 3]


def time_steps(rows: list[Row], setting: Setting, rounds: int = 80, warm_up: int = 10) -> None:
    """Fills in what a step takes. The methods take turns step by step, so that a slow moment of the machine hits all.

    A method's mean step is the median over its steps of each kind (by the number of passes), weighted as they occur in its
    runs.
    """
    data = load(setting.noise, 0)
    batches = torch.split(torch.arange(N_TRAIN // 2), BATCH)[:-1]  # none of them held out
    epochs = math.ceil((warm_up + rounds) * BATCH / N_TRAIN)
    fits = [Fit(row.entry, make_net(0), data, epochs, 0) for row in rows]
    whole: list[dict[int, list[float]]] = [{} for _ in rows]
    inside: list[dict[int, list[float]]] = [{} for _ in rows]
    for t in range(warm_up + rounds):
        for i, fit in enumerate(fits):
            seconds, spent = fit.step(batches[t % len(batches)])
            if t >= warm_up:
                whole[i].setdefault(len(spent), []).append(seconds)
                inside[i].setdefault(len(spent), []).append(sum(spent))
    for row, steps, closures in zip(rows, whole, inside, strict=True):
        row.seconds_per_step = _mean_of_medians(steps, row.kinds)
        row.own_share = 1 - _mean_of_medians(closures, row.kinds) / row.seconds_per_step


def _mean_of_medians(by_kind: dict[int, list[float]], kinds: Counter[int]) -> float:
    weights = [kinds[kind] for kind in by_kind]
    return statistics.fmean(map(statistics.median, by_kind.values()), weights if any(weights) else None)


@dataclass
class Result:
    """The whole study: its setting and one row per entry."""

    setting: Setting
    rows: list[Row]
    seconds: float


def run(setting: Setting, runs: Path | None = None) -> Result:
    """Every entry on every seed, with a progress bar over the epochs. ``runs``: a folder to keep them in."""
    start = time.perf_counter()
    rows = [Row(entry) for entry in setting.entries]
    epochs = sum(entry.longer for entry in setting.entries) * len(setting.seeds) * setting.epochs
    with tqdm(total=epochs, unit="epoch", dynamic_ncols=True) as progress:
        for row in rows:
            for seed in setting.seeds:
                progress.set_description(f"{row.entry.name}, seed {seed}")
                row.runs.append(train(row.entry, setting, seed, progress, runs))
        progress.set_description("timing")
        time_steps(rows, setting)
    return Result(setting, rows, time.perf_counter() - start)
