"""One harness for the session; its table at the end, and its rows in bench/results."""

from __future__ import annotations

import gc

import pytest
import torch

from .harness import Harness

HARNESS = Harness()


@pytest.fixture
def harness():
    torch.manual_seed(0)
    gc.collect()
    return HARNESS


def pytest_terminal_summary(terminalreporter):
    if HARNESS.rows:
        path = HARNESS.write()
        terminalreporter.write_line("")
        terminalreporter.write_line(HARNESS.table())
        terminalreporter.write_line(f"written: {path}")
