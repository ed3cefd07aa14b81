"""The GPU kernels compiled for the CPU, every thread a fiber: see ``cuda_on_cpu.h``."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from bench import kernels
from samkern.backends import emulated_cuda, native

TESTS = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")


def why_not() -> str:
    """Why the kernels cannot be emulated here; empty if they can."""
    if native is None:
        return "samkern._C is not built"
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is not on the PATH"
    return "" if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


@functools.cache
def load() -> ModuleType:
    """Compiles the module that runs the kernels, once per process."""
    import pybind11

    include = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"), TESTS)]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-DSAMKERN_ON_CPU", *include]
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def compile_one(source: Path) -> str:
        target = Path(folder) / f"{source.stem}.o"
        subprocess.run([COMPILER, "-x", "c++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(
            pool.map(compile_one, [*kernels.SOURCES, TESTS / "barrier_stress.cu", TESTS / "cuda_on_cpu.cpp"])
        )
    library = Path(folder) / "cuda_on_cpu.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running() -> Iterator[ModuleType]:
    """Within the block, backend ``cuda`` is the emulator, set up as usual."""
    module = load()
    module.configure()
    with emulated_cuda(module):
        yield module
