"""Search of the settings that the demo uses, on its training data alone. Needs what the demo needs.

    python -m bench.search                           # all methods: a quarter of an hour
    python -m bench.search --method MSAM --method "MSAM, fading" --seeds 10 11 12 13 14 15
    python -m bench.search --table                   # only prints what the CSV has

Each run trains the demo's net on 1,000 of its 1,200 training samples, with wrong labels as in the demo, and is scored by the
accuracy on the other 200, whose labels are as wrong: knowing all right labels would score about 60 %. No test image is looked
at, and the seeds (wrong labels, initial weights, batches, which 200) are not those of the demo; six in a row hold out every
sample once. A row per run goes to bench/results/<device>/search.csv, and a run that is there is not repeated. The first seed
sees every setting, the others the two of each method that were best on it. The table is sorted by score; errors are over
seeds, which are harder or easier for all methods alike.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from samkern.demo import study
from samkern.demo.study import around, n_steps
from samkern.optim import (
    AESAM,
    ARSAM,
    GRST,
    LETSSAM,
    LPFSGD,
    MSAM,
    RST,
    SAM,
    WASAM,
    AELookSAM,
    Bernoulli,
    Difference,
    EveryK,
    LookLayerSAM,
    LookSAM,
    SAMk,
    SharpnessAware,
)

from .machine import folder

NOISE, FOLD = 0.4, 200
Options = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A method, or a composition, with one setting."""

    method: str
    options: Options
    make: Callable[[study.Task], torch.optim.Optimizer]
    held_out: int = 0
    rest: Options = field(default_factory=dict)  # of its entry in the study: an average, a loss

    @property
    def written(self) -> str:
        """The options as text."""
        return " ".join(f"{name}={value}" for name, value in self.options.items())


def each(method: type, *settings: Options, name: str = "", held_out: int = 0, **common: Any) -> Iterator[Candidate]:
    """A candidate for each setting. ``common``: options that are not worth writing down."""
    for options in settings:
        yield Candidate(name or method.__name__, options, around(method, **common, **options), held_out)


def differences(*settings: Options) -> Iterator[Candidate]:
    """A look every k-th step, and its difference in between: a composition that no paper wrote."""
    for options in settings:
        reuse = {name: value for name, value in options.items() if name in ("beta", "max_age")}
        make = around(
            SharpnessAware,
            schedule=lambda _, k=options["k"]: EveryK(k),
            reuse=lambda _, reuse=reuse: Difference(**reuse),
            radius=options["rho"],
        )
        yield Candidate("Difference every k", options, make)


def fading(*settings: Options) -> Iterator[Candidate]:
    """MSAM on steps that are drawn with a falling probability, so that the end is at the weights that are tested."""
    for options in settings:
        schedule = lambda task, kind=options["p"]: Bernoulli(kind, total_steps=task.n_steps)  # noqa: E731
        yield Candidate("MSAM, fading", options, around(MSAM, rho=options["rho"], schedule=schedule))


def averaged(method: type, averages: Options, *settings: Options, name: str, **common: Any) -> Iterator[Candidate]:
    """A candidate for each setting and each average of its weights."""
    for options in settings:
        for written, average in averages.items():
            make = study.sgd if method is torch.optim.SGD else around(method, **common, **options)
            yield Candidate(name, {**options, "average": written}, make, rest={"average": average})


def reestimated(candidates: Iterator[Candidate]) -> Iterator[Candidate]:
    """With statistics of BatchNorm that are estimated anew before a test."""
    return (replace(candidate, rest={"reestimate": True}) for candidate in candidates)


def with_losses(loss: Callable[..., Any], *settings: Options, name: str) -> Iterator[Candidate]:
    """SGD with another loss."""
    for options in settings:
        yield Candidate(name, options, study.sgd, rest={"loss": loss(**options)})


def grid(**values: list[Any]) -> list[Options]:
    """All combinations."""
    settings: list[Options] = [{}]
    for name, choices in values.items():
        settings = [{**setting, name: value} for setting in settings for value in choices]
    return settings


def candidates() -> list[Candidate]:
    """What is tried: a few settings of each method."""
    return [
        Candidate("SGD", {}, study.sgd),
        *each(SAM, *grid(rho=[0.2, 0.4])),
        *each(SAMk, *grid(rho=[0.2, 0.4], k=[5])),
        *each(LookSAM, *grid(rho=[0.1, 0.2, 0.4], k=[5], alpha=[0.7]), *grid(rho=[0.2], k=[5], alpha=[0.5, 1.0])),
        *each(LookSAM, *grid(rho=[0.2, 0.4], k=[10], alpha=[0.7]), name="LookSAM, fewer looks"),
        *each(LookLayerSAM, *grid(rho=[0.01, 0.02, 0.04], k=[5])),
        *differences(*grid(rho=[0.2, 0.4], k=[5], beta=[0.7, 0.9, 1.0])),
        *each(ARSAM, {"rho": 0.2}),
        *each(ARSAM, *grid(rho=[0.2, 0.4], window=[20], max_rate=[0.2], beta=[0.9, 1.0], max_age=[None])),
        *each(ARSAM, *grid(rho=[0.2], window=[20], max_rate=[0.5], beta=[0.9], max_age=[None])),
        *each(RST, *grid(rho=[0.2, 0.4, 0.8], schedule=["piecewise-1"]), total_steps=n_steps, name="RST, late half"),
        *each(RST, *grid(rho=[0.2, 0.4], schedule=["piecewise-2"]), total_steps=n_steps, name="RST, early half"),
        *each(GRST, *grid(rho=[0.2, 0.4], gamma=[1.5, 2.0], schedule=["piecewise-1"]), total_steps=n_steps),
        *each(GRST, *grid(rho=[0.1, 0.2], p=[0.25], gamma=["match"]), name="GRST, constant p"),
        *each(AESAM, *grid(rho=[0.2, 0.4, 0.8]), total_steps=n_steps),
        *each(AELookSAM, *grid(rho=[0.2, 0.4], rule=["R1", "R3"], k=[5]), total_steps=n_steps),
        *each(MSAM, *grid(rho=[0.5, 0.7, 1.0, 1.25, 1.5, 2.0, 3.0])),
        *fading(*grid(rho=[1.5, 2.0, 3.0], p=["linear-down", "cosine-down"])),
        *each(LETSSAM, *grid(rho=[0.2], beta=[0.01, 0.1, 1.0]), held_out=100),
        *reestimated(each(LPFSGD, *grid(std=[0.02, 0.05, 0.1], inc=[1.0, 4.0], draws=[1]), total_steps=n_steps)),
        *averaged(
            LPFSGD,
            {"late mean": study.late_mean(0.75)},
            *grid(std=[0.05, 0.1], inc=[1.0], draws=[1]),
            name="LPFSGD, mean of the last quarter",
            total_steps=n_steps,
        ),
        *averaged(torch.optim.SGD, {f"EMA({b})": study.ema(b) for b in (0.9, 0.99, 0.998)}, {}, name="SGD, averaged"),
        *averaged(torch.optim.SGD, {"late mean": study.late_mean(0.75)}, {}, name="SGD, averaged"),
        *averaged(WASAM, {"own": study.own_average}, *grid(rho=[0.2, 0.4]), name="WASAM", total_steps=n_steps),
        *with_losses(study.saf, *grid(lam=[0.3, 1.0, 3.0], start_epoch=[5], lag=[3]), name="SAF"),
        *with_losses(study.mesa, *grid(decay=[0.99, 0.998], lam=[0.8, 3.0], start_epoch=[5]), name="MESA"),
    ]


def promising(chosen: list[Candidate], rows: list[dict[str, str]], n: int = 2) -> list[Candidate]:
    """The best ``n`` settings of each method."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        scores.setdefault((row["method"], row["options"]), []).append(float(row["held_out_accuracy"]))
    mean = {key: statistics.fmean(values) for key, values in scores.items()}
    by_method: dict[str, list[Candidate]] = {}
    for candidate in sorted(chosen, key=lambda c: -mean[c.method, c.written]):
        by_method.setdefault(candidate.method, []).append(candidate)
    return [candidate for settings in by_method.values() for candidate in settings[:n]]


@dataclass(frozen=True)
class Row:
    """A run, as it goes into the CSV. Accuracies in per cent, with the wrong labels."""

    method: str
    options: str
    seed: int
    epochs: int
    held_out_accuracy: float
    train_accuracy: float
    pairs_per_step: float
    seconds: float
    torch: str
    time: str


def fold(seed: int) -> study.Digits:
    """The demo's training data, 200 of it, others for every seed, in place of the test data."""
    data = study.load(NOISE, seed)
    x, y = (part.roll(-FOLD * (seed % (study.N_TRAIN // FOLD)), 0) for part in (data.train_x, data.train_y))
    return study.Digits(x[FOLD:], y[FOLD:], x[:FOLD], y[:FOLD])


def score(candidate: Candidate, seed: int, epochs: int) -> Row:
    """One run."""
    start = time.perf_counter()
    data, net = fold(seed), study.make_net(seed)
    entry = study.Entry("", candidate.make, held_out=candidate.held_out, **candidate.rest)
    fit = study.Fit(entry, net, data, epochs, seed)
    *_, pairs = fit.run()
    with fit.tested():
        (_, held_out), (_, train) = (
            study.score(net, x, y) for x, y in ((data.test_x, data.test_y), (data.train_x, data.train_y))
        )
    return Row(
        method=candidate.method,
        options=candidate.written,
        seed=seed,
        epochs=epochs,
        held_out_accuracy=round(held_out, 2),
        train_accuracy=round(train, 2),
        pairs_per_step=round(pairs / fit.kinds.total(), 4),
        seconds=round(time.perf_counter() - start, 2),
        torch=torch.__version__,
        time=time.strftime("%Y-%m-%dT%H:%M:%S"),
    )


def run_once(candidate: Candidate, seed: int, epochs: int, path: Path) -> None:
    """A run and its row, unless the CSV has it."""
    what = [candidate.method, candidate.written, str(seed), str(epochs)]
    if any(what == [row[name] for name in ("method", "options", "seed", "epochs")] for row in read(path)):
        return
    row = score(candidate, seed, epochs)
    append(path, row)
    setting = f"{row.method} {row.options}".strip()
    print(f"seed {seed}  {row.held_out_accuracy:5.1f} %  {row.pairs_per_step:.2f} pairs  {setting}", flush=True)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV, if there is one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Row) -> None:
    """Adds a row in one write, so that two searches of different methods may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(asdict(row))


def table(rows: list[dict[str, str]]) -> str:
    """One line per setting, the best score first, with the standard error over seeds."""
    by_setting: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        by_setting.setdefault((f"{row['method']} {row['options']}".strip(), row["epochs"]), []).append(row)
    lines = []
    for (setting, epochs), group in by_setting.items():
        scores, fitted, pairs = (
            [float(row[name]) for row in group] for name in ("held_out_accuracy", "train_accuracy", "pairs_per_step")
        )
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        cells = f"{statistics.fmean(scores):8.2f} +- {error:4.2f}{statistics.fmean(fitted):9.1f}"
        lines.append(
            (statistics.fmean(scores), f"{cells}{statistics.fmean(pairs):8.2f}{len(group):7}{epochs:>8}  {setting}")
        )
    title = f"{'held out %':>16}{'train %':>9}{'pairs':>8}{'seeds':>7}{'epochs':>8}  setting"
    return "\n".join([title, "-" * 72, *(line for _, line in sorted(lines, key=lambda pair: -pair[0]))])


def main(arguments: list[str] | None = None) -> int:
    """Runs the search and prints its table. Returns the exit code."""
    names = sorted({candidate.method for candidate in candidates()})
    parser = argparse.ArgumentParser(
        prog="python -m bench.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", action="append", choices=names, help="only this one; again for more")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12], help="a run for each (10 11 12)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training data (40)")
    parser.add_argument("--results", type=Path, help="folder for search.csv (bench/results/<device>)")
    parser.add_argument("--table", action="store_true", help="runs nothing")
    options = parser.parse_args(arguments)
    path = (options.results or folder(torch.device("cpu"))) / "search.csv"
    chosen = [c for c in candidates() if not options.table and c.method in (options.method or names)]
    for i, seed in enumerate(options.seeds):
        if i == 1:
            first = [row for row in read(path) if row["seed"] == str(options.seeds[0])]
            chosen = promising(chosen, [row for row in first if row["epochs"] == str(options.epochs)])
        for candidate in chosen:
            run_once(candidate, seed, options.epochs, path)
    print(table(read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
