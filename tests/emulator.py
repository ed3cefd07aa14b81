"""The GPU kernels compiled for the CPU, every thread a fiber: see ``cuda_on_cpu.h``."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from bench import kernels
from samkern.backends import emulated_cuda, native

from . import once

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
    """The module that runs the kernels, compiled by the first process that asks."""
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", once.made("cuda_on_cpu.so", compile_to))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_to(library: Path) -> None:
    """The kernels, what they are launched by, and the barrier's stress test, as a module for Python."""
    import pybind11

    include = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"), TESTS)]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-DSAMKERN_ON_CPU", *include]

    def compile_one(source: Path) -> str:
        target = library.with_name(f"{source.stem}.o")
        subprocess.run([COMPILER, "-x", "c++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(
            pool.map(compile_one, [*kernels.SOURCES, TESTS / "barrier_stress.cu", TESTS / "cuda_on_cpu.cpp"])
        )
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(library)], check=True)


@contextlib.contextmanager
def running() -> Iterator[ModuleType]:
    """Within the block, backend ``cuda`` is the emulator, set up as usual."""
    module = load()
    module.configure()
    with emulated_cuda(module):
        yield module
