"""``python -m samkern demo``: what flat minima are worth when labels are wrong, on real data, in a few minutes on a laptop."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..backends import info
from ..extras import needed
from ..reporting import report as write_page

MISSING = "the demo needs scikit-learn (for its data), matplotlib, tqdm, jinja2 and plotly: pip install samkern[demo]"


def main(arguments: list[str] | None = None) -> int:
    """Trains every method on every seed, prints the table, writes ``demo.png``, ``demo.json``, a folder for each run, and the
    page that compares them, whose path comes last. Returns the exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m samkern demo", description=__doc__)
    parser.add_argument("--noise", type=float, default=40.0, help="%% of training labels replaced by wrong ones (40)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every method (3)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training data (40)")
    parser.add_argument("--quick", action="store_true", help="one seed and seven of the methods: under a minute")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-results"), help="folder for what is written (demo-results)"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.noise <= 100:
        parser.error(f"--noise must be between 0 and 100, got {options.noise}")
    if options.seeds < 1 or options.epochs < 1:
        parser.error(f"--seeds and --epochs must be at least 1, got {options.seeds} and {options.epochs}")
    try:
        needed("jinja2", "reports"), needed("plotly", "reports")  # not after minutes of training
        from . import report, study
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; {MISSING}") from None

    if options.quick:
        options.seeds = 1
    entries = tuple(entry for entry in study.ENTRIES if entry.in_quick or not options.quick)
    print(info(), end="\n\n")
    setting = study.Setting(options.noise / 100, options.epochs, tuple(range(options.seeds)), entries)
    result = study.run(setting, options.out / "runs")
    print()
    print(report.table(result))
    paths = report.write(result, options.out)
    print("\nwritten: " + ", ".join(map(str, paths)))
    folders = [run.folder for row in result.rows for run in row.runs if run.folder is not None]
    title = f"Digits with {options.noise:g} % wrong training labels"
    print(write_page(folders, options.out / "report.html", title))
    return 0
