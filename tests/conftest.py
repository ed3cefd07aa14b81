"""Fixtures of all tests: seeds, and the backends that can run here."""

import warnings

import pytest
import torch

import samkern

# Those that serve CPU tensors, which most tests make; test_gpu.py and test_triton.py have the others.
AVAILABLE = [name for name in ("reference", "cpu") if samkern.backends()[name].available]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    # Random half-precision parameters are what many tests are about.
    warnings.filterwarnings("ignore", message="half-precision weights lose perturbations")


@pytest.fixture(params=AVAILABLE)
def backend(request):
    return request.param


def pytest_report_header():
    return samkern.info().splitlines()


def pytest_terminal_summary(terminalreporter):
    for name, backend in samkern.backends().items():
        if not backend.available:
            terminalreporter.write_line(f"backend {name} was not tested: {backend.why}")
