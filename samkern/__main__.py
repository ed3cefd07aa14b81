"""``python -m samkern info | demo | report | bench``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .backends import info

USAGE = """usage: python -m samkern <command>

  info              version, backends and why each can or cannot run here, build facts
  demo [options]    trains methods of the family on real data and compares them; see demo --help
  report FOLDER...  one HTML page that compares runs; see report --help
  bench [options]   micro-benchmarks of the passes, from a source checkout; options are pytest's
"""


def bench(arguments: list[str]) -> int:
    """Runs the benchmarks of the source checkout that this package was installed from (editable)."""
    folder = Path(__file__).parent.parent / "bench"
    if not folder.is_dir():
        sys.exit("the benchmarks are in samkern's source folder, not in the installed package: run `make bench` there")
    return subprocess.call([sys.executable, "-m", "pytest", str(folder), "-q", *arguments])


def main(arguments: list[str]) -> int:
    """Runs the command named first and returns its exit code."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if command == "info":
        print(info())
        return 0
    if command == "demo":
        from .demo import main as demo

        return demo(rest)
    if command == "report":
        from .reporting.command import main as report

        return report(rest)
    if command == "bench":
        return bench(rest)
    print(USAGE, end="")
    return 0 if command in ("help", "-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
