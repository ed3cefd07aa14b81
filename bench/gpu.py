"""Everything that needs a GPU, in less than nine minutes: build, tests, benchmarks, sanitizers. `make gpu` runs it.

By worth: what comes last gets what time is left, see ``stages.py``. What is timed runs alone; the sanitizers and the slow
tests of the CPU come last, side by side. Each stage's output is a file in ``bench/results/<name of the GPU>/``, and
``summary.txt`` tells how all of them ended, with the measurements and the bars that they have to meet.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import torch

from .machine import folder
from .stages import SECONDS, Round, Stage, last_lines, passed, run_all

PYTHON = sys.executable
TOTAL = 525.0  # of the 540 seconds that it may take; the rest is for what is under way when they are over
AFTERWARDS = """Not in here: training on CIFAR-10, which takes 8 minutes of its own:
    SAMKERN_DATA=<the data file that bench/cifar.py describes> python -m bench.train --quick"""


def pytest(*arguments: str, spread: str = "") -> tuple[str, ...]:
    """``spread``: over several processes, if pytest-xdist is here: "load" test by test, "loadfile" file by file."""
    shared = spread and importlib.util.find_spec("xdist") is not None
    workers = ("-n", str(min(8, os.cpu_count() or 1)), "--dist", spread) if shared else ()
    return (PYTHON, "-m", "pytest", "-q", "--tb=short", *workers, *arguments)


def sanitizer(tool: str) -> Stage:
    """compute-sanitizer on a small case of each kernel. Every allocation is torch's own, so that none hides in another."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    case = pytest("-x", "tests/test_gpu.py", "-k", "small_case and cuda")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(f"sanitizer-{tool}", (*command, *case), 180, needs="compute-sanitizer", environment=environment)


def rounds(architecture: str, target: Path) -> list[Round]:
    """``architecture``: of this GPU, as "9.0"; to build for others too would take as long again for each. ``target``: where
    the benchmark's rows go."""
    steps = (PYTHON, "-m", "bench.gpu_steps", "--seconds", SECONDS, "--out", str(target))
    build = (PYTHON, "setup.py", "build_ext", "--inplace")
    whole_suite = pytest("tests", "--ignore=tests/test_gpu.py", "-k", "not on_a_gpu", spread="loadfile")
    on_gpu = "test_gpu or on_a_gpu or one_launch or synchronization"
    return [
        [Stage("build", build, 200, 60, environment={"SAMKERN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture})],
        # Triton's kernels need no compiler, and the suite can do with the CPU's.
        [Stage("build-cpu", build, 90, instead_of="build", environment={"SAMKERN_CUDA": "0"})],
        [Stage("info", (PYTHON, "-m", "samkern", "info"), 30, 10)],
        [
            Stage(
                "gpu-tests",
                pytest(
                    *("tests/test_gpu.py", "tests/test_triton.py"),
                    *("-k", f"({on_gpu}) and not barrier and not launches"),
                    spread="load",
                ),
                150,  # most of it is Triton's compiler
                60,
            )
        ],
        [Stage("barrier", pytest("tests/test_gpu.py", "-k", "barrier"), 60, 20)],
        [Stage("launches", pytest("tests/test_gpu.py", "-v", "-k", "launches"), 40, 15)],
        [Stage("steps", steps, 170, 120, shows=60)],
        [
            Stage("tests", whole_suite, 240, 60),
            *(sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
        ],
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs all stages, prints and writes a summary. Returns 1 if one failed or took too long."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all stages together, the build included")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a GPU that torch can use; torch.cuda.is_available() is False")
    major, minor = torch.cuda.get_device_capability()
    target = (options.out or folder(torch.device("cuda"))).resolve()
    stages = rounds(f"{major}.{minor}", target)
    endings = run_all(stages, options.seconds, target, say=lambda line: print(line, flush=True))
    report = f"\n{last_lines(stages, endings, target)}\n{AFTERWARDS}\n"
    print(report)
    with (target / "summary.txt").open("a") as file:
        file.write(report)
    return 0 if all(passed(ending) or ending.startswith("left out") for ending in endings.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
