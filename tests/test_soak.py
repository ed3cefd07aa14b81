"""The soak for some seconds: it passes, and finds what is leaked on purpose."""

from __future__ import annotations

import pytest

from . import soak

SECONDS = 2


@pytest.fixture(autouse=True)
def _nothing_stays():
    yield
    soak.LEAKED.clear()


def run(capsys, *arguments):
    n_grown = soak.main(["--minutes", str(SECONDS / 60), "--seed", "1", *arguments])
    return n_grown, capsys.readouterr().out


def test_nothing_grows(capsys):
    n_grown, text = run(capsys)
    assert n_grown == 0, text
    assert text.count(" cases ") >= soak.LEAST


def test_leaks_are_found(capsys):
    """None of them is found by the others: lists are no tensors, and bytes are no objects that are counted."""
    n_grown, text = run(capsys, "--leak", *soak.LEAKS)
    assert n_grown == len(soak.LEAKS)
    for leak in soak.LEAKS:
        (line,) = [line for line in text.splitlines() if line.startswith(leak)]
        assert line.endswith("has grown")


def test_a_case_that_fails_is_printed_and_can_be_run_again(capsys, monkeypatch):
    assert soak.main(["--case", "5", "6"]) == 0

    def fails(self):
        raise AssertionError("on purpose")

    monkeypatch.setattr(soak.Trial, "run", fails)
    assert soak.main(["--minutes", "0.01", "--seed", "3"]) == 1
    text = capsys.readouterr().out
    assert "AssertionError: on purpose" in text
    assert "seed 3" in text
    assert "on cpu: Case(" in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([9, 9, 9, 9, 9, 9, 9, 9, 9, 9], 0),
        ([1, 5, 9, 10, 10, 10, 10, 10, 10, 10], 0),
        ([0, 0, 0, 10, 11, 12, 13, 14, 15, 16], 6),
        ([0, 0, 0, 10, 11, 12, 90, 14, 15, 16], 6),
        ([0, 0, 0, 4, 4, 4, 9, 9, 9, 9], 5),
    ],
    ids=["constant", "warms up", "leaks", "leaks, one sample is off", "a step"],
)
def test_growth(values, expected):
    assert soak.growth(list(enumerate(values))) == pytest.approx(expected, abs=1)
