"""What nvcc makes of the GPU kernels: registers, spills and shared memory of each. `make kernels` writes the table."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ("-std=c++20", "-O3", "-fmad=false")
ARCHITECTURES = ("80", "90", "100")
TABLE = ROOT / "bench" / "results" / "kernels.csv"

KINDS = ("float32", "bfloat16", "float16", "any")  # csrc/cuda/packs.cuh: Kind
BASES = ("none", "SGD", "Adam", "AdamW")  # csrc/plan.h: Base


@dataclass(frozen=True)
class Kernel:
    """One entry function on one architecture. ``spills``: bytes stored and loaded, of functions it calls too."""

    kernel: str
    architecture: str
    registers: int
    spills: int
    stack: int
    shared: int


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return shutil.which("nvcc")


def compile_to(kind: str, source: Path, architecture: str, target: Path) -> str:
    """Compiles ``source`` with ``-cubin`` or ``-ptx`` and returns what ptxas said of it."""
    command = [nvcc() or "nvcc", f"-{kind}", str(source), "-o", str(target), *FLAGS]
    command += [f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stderr


def measure(source: Path, architecture: str) -> list[Kernel]:
    """All kernels of ``source``."""
    with tempfile.TemporaryDirectory() as folder:
        text = compile_to("cubin", source, architecture, Path(folder) / "kernels.cubin")
    kernels = []
    # A function that a kernel calls is reported after it, without a line of its own on registers.
    for block in re.split(r"(?=Compiling entry function)", text)[1:]:
        name = re.search(r"entry function '(\S+)'", block)
        used = re.search(r"Used (\d+) registers(.*)", block)
        assert name is not None
        assert used is not None, block
        shared = re.search(r"(\d+) bytes smem", used[2])
        spills = sum(
            int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        )
        stack = sum(map(int, re.findall(r"(\d+) bytes stack frame", block)))
        kernel = Kernel(
            readable(name[1]), f"sm_{architecture}", int(used[1]), spills, stack, int(shared[1]) if shared else 0
        )
        kernels.append(kernel)
    return kernels


def readable(symbol: str) -> str:
    """ "update bfloat16 AdamW" from the mangled name."""
    name = re.search(r"(perturb|noise|reduce|difference|update|restore|topk|drop_grow|fisher)_kernel", symbol)
    assert name is not None, symbol
    kind, base = re.search(r"KindE(\d)", symbol), re.search(r"BaseE(\d)", symbol)
    wide = ["of float64"] if re.search(r"KindE\dEd", symbol) else []
    parts = [name[1], *([KINDS[int(kind[1])]] if kind else []), *([BASES[int(base[1])]] if base else []), *wide]
    return " ".join(parts)


def main() -> int:
    if nvcc() is None:
        sys.exit("make kernels needs nvcc on the PATH")
    rows = [kernel for source in SOURCES for arch in ARCHITECTURES for kernel in measure(source, arch)]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kernel)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"{'kernel':<26}{'':<8}{'registers':>10}{'spills':>8}{'stack':>7}{'shared':>8}")
    for row in rows:
        print(f"{row.kernel:<26}{row.architecture:<8}{row.registers:>10}{row.spills:>8}{row.stack:>7}{row.shared:>8}")
    print(f"written: {TABLE}")
    return 1 if any(row.spills for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
