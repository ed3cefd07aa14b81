"""Everything that needs a GPU, one stage after another. `make gpu` builds and runs it.

Each stage's output is a file in ``bench/results/<name of the GPU>/``; a stage that fails does not stop the next.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from .gpu_steps import folder

PYTHON = sys.executable


@dataclass(frozen=True)
class Stage:
    """A command and how long it may take. ``needs``: a program without which it is left out."""

    name: str
    command: tuple[str, ...]
    seconds: int
    needs: str = ""


def sanitizer(tool: str) -> Stage:
    """compute-sanitizer on a small case of each kernel."""
    case = (PYTHON, "-m", "pytest", "-q", "-x", "tests/test_gpu.py", "-k", "small_case and cuda")
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *case)
    return Stage(f"sanitizer-{tool}", command, 60, needs="compute-sanitizer")


STAGES = (
    Stage("info", (PYTHON, "-m", "samkern", "info"), 60),
    Stage("gpu-tests", (PYTHON, "-m", "pytest", "-q", "tests/test_gpu.py", "tests/test_triton.py"), 150),
    *(sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck")),
    Stage("steps", (PYTHON, "-m", "bench.gpu_steps"), 120),
    Stage(
        "tests", (PYTHON, "-m", "pytest", "-q", "-x", "--ignore=tests/test_cuda.py", "--ignore=tests/test_demo.py"), 240
    ),
)


def run(stage: Stage, target: object) -> str:
    """Runs a stage and returns how it ended."""
    if stage.needs and shutil.which(stage.needs) is None:
        return f"left out: {stage.needs} is not here"
    start = time.perf_counter()
    with open(str(target), "w") as file:
        try:
            result = subprocess.run(
                stage.command, stdout=file, stderr=subprocess.STDOUT, timeout=stage.seconds, check=False
            )
            ending = "passed" if result.returncode == 0 else f"failed with {result.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"stopped after {stage.seconds} s"
    return f"{ending}, {time.perf_counter() - start:.0f} s"


def main() -> int:
    """Runs all stages, prints and writes a summary. Returns 1 if one failed."""
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a GPU that torch can use; torch.cuda.is_available() is False")
    results = folder(torch.device("cuda"))
    results.mkdir(parents=True, exist_ok=True)
    lines = []
    for stage in STAGES:
        lines.append(f"{stage.name:<22}{run(stage, results / f'{stage.name}.txt')}")
        print(lines[-1], flush=True)
    (results / "summary.txt").write_text("\n".join(lines) + "\n")
    return 1 if any("failed" in line or "stopped" in line for line in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
