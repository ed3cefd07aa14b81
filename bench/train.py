"""Training study: what each method brings and costs on CIFAR-10 with a ResNet-18, on one GPU.

    export SAMKERN_DATA=cifar10-jpeg.npz             # or --data; bench/cifar.py describes the file
    python -m bench.train --quick                    # SGD, SAM and LookSAM, 20,000 images, 15 epochs: a few minutes
    python -m bench.train --method sgd --method sam --option rho=0.1 --method looksam --option rho=0.1 --option k=5 \\
                          --seeds 0 1 2 --checkpoints runs --resume
    python -m bench.train --smoke                    # all methods, synthetic images, a narrow net, on the CPU: seconds

Runs go one after another, every method on every seed. ``--option`` belongs to the ``--method`` before it. A row per epoch
goes to bench/results/<device>/train.csv, and each run to a folder below bench/results/<device>/runs; at the end stand a page
that compares the runs and a table: accuracy, generalisation gap, forward-backward pairs, and time per step against SGD, where
the bar is 3 % above the number of pairs.

bfloat16 autocast, channels last, SGD with momentum 0.9 and weight decay 5e-4, cosine decay after a linear warm-up. Images
and augmentation live on the device; batches depend on seed and epoch alone, so all methods see the same ones: but LETS, for
whose validation batches the last tenth of the training images is held out. Test images are for testing alone.

With ``--checkpoints`` there is a checkpoint after each epoch, and ``--resume`` goes on from there: on the CPU to the same
bits as without the stop. Ctrl-C loses the epoch under way. Runs that are complete are not repeated.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import samkern
from samkern import NotBuiltError

from . import cifar, train_log
from .harness import RESULTS
from .train_run import Entry, Run, Setting, make_optimizer, methods, n_validation

TEMPORARY = Path(tempfile.gettempdir())
COMPARED = (("sgd", {}), ("sam", {"rho": 0.1}), ("looksam", {"rho": 0.1, "k": 5}))
PRESETS: dict[str, dict[str, int]] = {
    "full": {"images": 50_000, "epochs": 60, "batch": 128, "width": 64},
    "quick": {"images": 20_000, "epochs": 15, "batch": 128, "width": 64},
    "smoke": {"images": 256, "epochs": 2, "batch": 64, "width": 4},
}


class AddMethod(argparse.Action):
    """``--method NAME``: one more entry."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: Any = None) -> None:
        namespace.entries = [*namespace.entries, (value, {})]


class AddOption(argparse.Action):
    """``--option NAME=VALUE``: an option of the entry before it."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: Any = None) -> None:
        if not namespace.entries:
            parser.error(f"--option {value} must come after the --method that it belongs to")
        name, equals, text = value.partition("=")
        if not equals or not name:
            parser.error(f"--option must be NAME=VALUE, got {value!r}")
        method, options = namespace.entries[-1]
        namespace.entries = [*namespace.entries[:-1], (method, {**options, name: option_value(text)})]


def option_value(text: str) -> Any:
    """A Python literal, ``inf``, a dtype of torch (``bfloat16``), or else the text itself."""
    if text == "inf":
        return float("inf")
    if isinstance(getattr(torch, text, None), torch.dtype):
        return getattr(torch, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(entries=[], preset="full")
    parser.add_argument("--method", action=AddMethod, choices=methods(), help="again for each one that is compared")
    parser.add_argument("--option", action=AddOption, metavar="NAME=VALUE", help="of the method before it: rho=0.1")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="preset", action="store_const", const="quick", help="20,000 images, 15 epochs")
    sizes.add_argument("--smoke", dest="preset", action="store_const", const="smoke", help="seconds on a CPU, no data")
    for name in ("images", "epochs", "batch", "width"):
        values = ", ".join(f"{preset[name]:,} ({key})" for key, preset in PRESETS.items())
        parser.add_argument(f"--{name}", type=int, help=f"by default {values}")
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate (0.1)")
    parser.add_argument("--warm-up", type=float, default=1.0, help="epochs of linear warm-up (1)")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of every method for each (0)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the net in training")
    parser.add_argument("--device", help="cuda where there is one, else cpu; smoke: cpu")
    data = os.environ.get("SAMKERN_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) if data else None, help="the npz; else SAMKERN_DATA")
    parser.add_argument("--cache", type=Path, default=TEMPORARY / "samkern-cifar10", help="folder for decoded images")
    parser.add_argument("--checkpoints", type=Path, help="folder for a checkpoint per run, written after each epoch")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoints, where there are any")
    parser.add_argument("--results", type=Path, help="folder for <device>/train.csv (bench/results; smoke: temporary)")
    parser.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="an HTML page of these runs at the end (yes)",
    )
    return parser


def check(parser: argparse.ArgumentParser, entries: list[Entry], setting: Setting, options: Any) -> None:
    """Ends the program with a message if anything is out of range, before the first run has begun."""
    for name in ("epochs", "batch", "width"):
        if getattr(setting, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(setting, name)}")
    if setting.images < setting.batch:
        parser.error(f"--images must be at least a batch of {setting.batch}, got {setting.images}")
    if options.resume and options.checkpoints is None:
        parser.error("--resume needs --checkpoints, the folder to go on from")
    for entry in entries:
        if setting.images - n_validation(entry, setting) < setting.batch:
            parser.error(f"--images must leave {entry.method} a batch of {setting.batch} beside its validation images")
        try:
            make_optimizer(entry, setting, nn.Linear(1, 1))
        except (ValueError, TypeError, NotBuiltError) as error:
            parser.error(f"--method {entry.method} {entry.written}: {error}")


def run_all(
    entries: list[Entry], setting: Setting, data: cifar.Cifar, device: torch.device, options: Any
) -> list[list[train_log.Row]]:
    """Every method on every seed, with a line and a row in the CSV for each epoch. Returns the rows of each run."""
    path = (options.results or RESULTS) / train_log.device_name(device) / "train.csv"
    train_log.append(path, [])  # if that is not possible, it shows before hours of training
    rows, folders = [], []
    for entry in entries:
        for seed in options.seeds:
            run = Run(entry, seed, setting, data, device)
            checkpoint = options.checkpoints / f"{run.name}.pt" if options.checkpoints else None
            goes_on = options.resume and checkpoint.exists()
            if goes_on:
                run.load(checkpoint)
                train_log.append(path, run.rows)
                print(f"{run.name}: goes on after epoch {len(run.rows)} of {setting.epochs}", flush=True)
            folder = run.folder(path.parent / "runs", resume=goes_on)
            train_log.note(folder, run.rows)
            with run.history(folder) as history:
                while not run.finished:
                    row = run.train_epoch(history)
                    # In this order: an epoch that is on record is never trained again, and a missing row is added later.
                    if checkpoint:
                        run.save(checkpoint)
                    train_log.append(path, [row])
                    train_log.note(folder, [row])
                    print(train_log.line(row), flush=True)
            folder.measures({name.replace("_", " "): value for name, value in run.flatness().items()})
            rows.append(run.rows)
            folders.append(folder.path)
    print(f"\nwritten: {path}")
    if options.report:
        write_page(folders)
    return rows


def write_page(folders: list[Path]) -> None:
    """The page that compares these runs, beside them, where the packages that it takes are installed."""
    try:
        print(samkern.report(folders, folders[0].parent / "report.html", "Training study on CIFAR-10"))
    except ModuleNotFoundError as error:
        print(f"no report: {error}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the study and prints its table. Returns the exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    smoke = options.preset == "smoke"
    chosen = {name: getattr(options, name) for name in PRESETS["full"] if getattr(options, name) is not None}
    setting = Setting(
        **{**PRESETS[options.preset], **chosen},
        lr=options.lr,
        warm_up=options.warm_up,
        label_smoothing=options.label_smoothing,
        compiled=options.compile,
    )
    default = [(name, {}) for name in methods()] if smoke else COMPARED
    entries = [Entry(*entry) for entry in options.entries or default]
    check(parser, entries, setting, options)
    if smoke and options.results is None:
        options.results = TEMPORARY / "samkern-smoke"  # its numbers are no measurements
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() and not smoke else "cpu"))
    torch.backends.cudnn.benchmark = True
    try:
        data = (
            cifar.synthetic(setting.images, 100) if smoke else cifar.load(options.data, options.cache, setting.images)
        )
        rows = run_all(entries, setting, data.to(device), device, options)
    except (cifar.DataError, train_log.StudyError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        kept = f"add --resume to go on from {options.checkpoints}" if options.checkpoints else "no checkpoint was kept"
        print(f"\nstopped; {kept}", file=sys.stderr)
        return 130
    print("\n" + train_log.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
