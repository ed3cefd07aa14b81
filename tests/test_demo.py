"""The demo, small: what it prints and writes has the right form. Its numbers are the README's business."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("jinja2")
pytest.importorskip("plotly")

from samkern import demo
from samkern.demo import report, study
from samkern.reporting import read_runs, slug
from samkern.sharpness import Measurement


@pytest.fixture
def short(monkeypatch):
    """No eigenvalues, coarse landscapes, and times that are no measurements."""
    monkeypatch.setattr(study, "top_eigenvalue", lambda *arguments, **options: Measurement(1.0))
    monkeypatch.setattr(study, "LANDSCAPE_POINTS", 3)
    monkeypatch.setattr(study, "time_steps", functools.partial(study.time_steps, rounds=4, warm_up=1))


@pytest.mark.takes(40)
@pytest.mark.usefixtures("short")
def test_one_epoch_of_everything(tmp_path, capsys):
    assert demo.main(["--epochs", "1", "--seeds", "2", "--noise", "20", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if " x " in line]
    assert len(lines) == len(study.ENTRIES)
    pairs = {entry.name: next(line for line in lines if line.startswith(entry.name + " ")) for entry in study.ENTRIES}
    assert "  2.00  " in pairs["SAM (rho 0.2)"]
    assert "  1.00  " in pairs["SGD, twice the epochs"]
    assert "  1.00  " in next(line for name, line in pairs.items() if name.startswith("MSAM"))
    assert "  2.11  " in next(line for name, line in pairs.items() if name.startswith("LETS"))  # one of 18 steps learns
    assert "the last 100 training samples are its validation data" in text
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["setting"] == {"noise": 0.2, "epochs": 1, "seeds": [0, 1]}
    assert [row["method"] for row in content["rows"]] == [entry.name for entry in study.ENTRIES]
    assert any(row["on_front"] for row in content["rows"])
    for row in content["rows"]:
        assert 0 <= row["test_accuracy"] <= 100
        assert 0 < row["own_share"] < 1
        assert row["pairs_per_step"] >= 1
        assert len(row["runs"]) == 2
    page = tmp_path / "report.html"
    assert text.splitlines()[-1] == str(page)
    assert "Digits with 20 % wrong training labels" in page.read_text()
    runs = read_runs(tmp_path / "runs")
    assert [run.name for run in runs] == [f"{slug(e.name)}-seed{seed}" for e in study.ENTRIES for seed in (0, 1)]
    plain = [entry.name for entry in study.ENTRIES if entry.make is study.sgd]  # torch's optimizers have no history
    for run, row in zip(runs, (row for row in content["rows"] for _ in range(2)), strict=True):
        last = run.epochs[-1]
        (curve,) = (of["curve"] for of in row["runs"] if of["seed"] == run.seed)
        assert [last["pairs"], last["test_accuracy"]] == curve[-1]
        assert last["steps"] == (len(run.steps) or last["steps"])
        assert bool(run.steps) == (run.method not in plain)
        assert 0 < last["train_loss"] < 5
        assert run.measures["top eigenvalue"].value == 1.0
        assert run.measures["fisher rao"].value > 0
    pictured = [entry.name for entry in study.ENTRIES if entry.pictured]
    assert [run.method for run in runs if run.landscapes] == pictured
    assert all(run.seed == 0 for run in runs if run.landscapes)


def test_missing_packages_are_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SystemExit, match="jinja2 is not installed; the demo needs"):
        demo.main(["--out", str(tmp_path)])


@pytest.mark.usefixtures("short")
def test_quick_has_one_seed_and_fewer_methods(tmp_path, capsys):
    assert demo.main(["--quick", "--epochs", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [entry.name for entry in study.ENTRIES if entry.in_quick]
    assert {len(row["runs"]) for row in rows} == {1}


@pytest.mark.takes(30)
def test_flat_minima_show_under_noise(tmp_path):
    """A short version of the claim: with 40 % wrong labels SAM beats SGD by far, and its minimum is flatter."""
    entries = tuple(entry for entry in study.ENTRIES if entry.name in ("SGD", "SAM (rho 0.2)"))
    result = study.run(study.Setting(0.4, 40, (0,), entries))
    sgd, sam = (row.runs[0] for row in result.rows)
    assert sam.test_accuracy > sgd.test_accuracy + 10
    assert sam.eigenvalue < sgd.eigenvalue / 3
    assert sam.train_accuracy < sgd.train_accuracy
    assert "40 % of their labels wrong" in report.table(result)


def row_of(name, test_accuracy, pairs):
    run = study.Run(0, test_accuracy, 60.0, 1.0, Counter({1: pairs}), [(pairs, test_accuracy)])
    return study.Row(study.Entry(name, study.sgd), [run])


def test_the_front():
    rows = [
        row_of("a", 90, 100),
        row_of("b", 95, 120),
        row_of("c", 95, 140),
        row_of("d", 94, 130),
        row_of("e", 96, 200),
    ]
    assert [row.entry.name for row in rows if report.on_front(row, rows)] == ["a", "b", "e"]
    twins = [row_of("a", 90, 100), row_of("b", 90, 100)]
    assert all(report.on_front(row, twins) for row in twins)


def test_held_out_samples_are_not_trained_on():
    data = study.load(0.4, 0)
    entry = next(entry for entry in study.ENTRIES if entry.held_out)
    poisoned = data.train_x.clone()
    poisoned[-entry.held_out :] = float("nan")  # reaches only the radius, which takes nothing that is not finite
    fit = study.Fit(entry, study.make_net(0), study.Digits(poisoned, data.train_y, data.test_x, data.test_y), 1, 0)
    assert list(fit.run()) == [18 * 2 + 2]
    assert fit.kinds == {2: 17, 4: 1}
    assert fit.opt.skips == 0
    assert float(fit.opt.radius) == pytest.approx(fit.opt.learned.initial)


def test_times_are_weighted_as_steps_occur_in_runs():
    row = study.Row(study.Entry("x", study.sgd), [study.Run(0, 0, 0, 0, Counter({1: 30, 2: 10}), [])])
    assert row.pairs_per_step == 1.25
    assert study._mean_of_medians({1: [1.0, 1.0, 9.0], 2: [2.0]}, row.kinds) == pytest.approx(1.25)
    assert study._mean_of_medians({4: [3.0]}, row.kinds) == 3.0


def test_labels():
    clean, noisy = study.load(0.0, 0), study.load(0.4, 0)
    assert clean.train_x.shape == (1200, 1, 8, 8)
    assert len(clean.test_y) == 597
    assert torch.equal(clean.test_y, noisy.test_y)
    assert int((clean.train_y != noisy.train_y).sum()) == 480
    assert not torch.equal(noisy.train_y, study.load(0.4, 1).train_y)


@pytest.mark.parametrize("arguments", [["--noise", "101"], ["--seeds", "0"], ["--epochs", "0"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert "must be" in capsys.readouterr().err
