"""``python -m samkern demo``: what flat minima are worth when labels are wrong, on real data, in a few minutes on a laptop."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..backends import info

MISSING = "the demo needs scikit-learn (for its data), matplotlib and tqdm: pip install scikit-learn matplotlib tqdm"


def main(arguments: list[str] | None = None) -> int:
    """Trains every method on every seed, prints the table, writes ``demo.png`` and ``demo.json``. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m samkern demo", description=__doc__)
    parser.add_argument("--noise", type=float, default=40.0, help="%% of training labels replaced by wrong ones (40)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every method (3)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training data (40)")
    parser.add_argument("--quick", action="store_true", help="one seed and seven of the methods: under a minute")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for demo.png and demo.json")
    options = parser.parse_args(arguments)
    if not 0 <= options.noise <= 100:
        parser.error(f"--noise must be between 0 and 100, got {options.noise}")
    if options.seeds < 1 or options.epochs < 1:
        parser.error(f"--seeds and --epochs must be at least 1, got {options.seeds} and {options.epochs}")
    try:
        from . import report, study
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; {MISSING}") from None

    if options.quick:
        options.seeds = 1
    entries = tuple(entry for entry in study.ENTRIES if entry.in_quick or not options.quick)
    print(info(), end="\n\n")
    result = study.run(study.Setting(options.noise / 100, options.epochs, tuple(range(options.seeds)), entries))
    print()
    print(report.table(result))
    paths = report.write(result, options.out)
    print("\nwritten: " + ", ".join(map(str, paths)))
    return 0
