"""Fixtures of all tests: seeds, and the backends that can run here."""

import contextlib
import importlib.util
import warnings

import pytest
import torch

import samkern
from samkern.backends import in_interpreter

from . import emulator

ON_GPU = torch.cuda.is_available()
BUILT = [name for name, backend in samkern.backends().items() if backend.available]
# Without a GPU its kernels run on the CPU, thread by thread. Triton's run in its interpreter if TRITON_INTERPRET=1.
EMULATED = "cuda" not in BUILT and not emulator.why_not()
AVAILABLE = [*BUILT, *(["cuda"] if EMULATED else [])]


def _repair_ranges():
    """``range`` over a tensor in Triton 3.6: it converts an array of one entry, which NumPy refuses since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *args):
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if in_interpreter() and importlib.util.find_spec("triton") is not None:
    _repair_ranges()


@contextlib.contextmanager
def _one_thread():
    """Kernels for GPUs take one thread on the CPU: others would only spin between torch's small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def on(name):
    """Tensors are made where backend ``name`` can take them."""
    if name == "cuda" and EMULATED:
        with _one_thread(), emulator.running():
            yield name
    elif name == "triton" and in_interpreter():
        with _one_thread():
            yield name
    elif ON_GPU and name in ("cuda", "triton"):
        with torch.device("cuda"):
            yield name
    else:
        yield name


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    # Random half-precision parameters are what many tests are about.
    warnings.filterwarnings("ignore", message="half-precision weights lose perturbations")


@pytest.fixture(params=AVAILABLE)
def backend(request):
    with on(request.param) as name:
        yield name


@pytest.fixture(params=[name for name in AVAILABLE if name != "reference"])
def fast(request):
    """A backend to compare with the reference."""
    with on(request.param) as name:
        yield name


def pytest_report_header():
    return samkern.info().splitlines()


def pytest_terminal_summary(terminalreporter):
    for name, backend in samkern.backends().items():
        if name not in AVAILABLE:
            terminalreporter.write_line(f"backend {name} was not tested: {backend.why}")
        elif not backend.available:
            terminalreporter.write_line(f"backend {name} was tested on the CPU: {backend.why}")
