"""The demo, small: what it prints and writes has the right form. Its numbers are the README's business."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from samkern import demo
from samkern.demo import report, study


def test_one_epoch_of_everything(tmp_path, capsys):
    assert demo.main(["--epochs", "1", "--seeds", "2", "--noise", "20", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if " x " in line]
    assert len(lines) == len(study.ENTRIES)
    pairs = {entry.name: next(line for line in lines if line.startswith(entry.name + " ")) for entry in study.ENTRIES}
    assert "  2.00  " in pairs["SAM (rho 0.2)"]
    assert "  1.00  " in pairs["SGD, twice the epochs"]
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["setting"] == {"noise": 0.2, "epochs": 1, "seeds": [0, 1]}
    assert [row["method"] for row in content["rows"]] == [entry.name for entry in study.ENTRIES]
    for row in content["rows"]:
        assert 0 <= row["test_accuracy"] <= 100
        assert 0 < row["own_share"] < 1
        assert len(row["runs"]) == 2


def test_quick_has_one_seed_and_fewer_methods(tmp_path, capsys):
    assert demo.main(["--quick", "--epochs", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [entry.name for entry in study.ENTRIES if entry.in_quick]
    assert {len(row["runs"]) for row in rows} == {1}


def test_flat_minima_show_under_noise(tmp_path):
    """A short version of the claim: with 40 % wrong labels SAM beats SGD by far, and its minimum is flatter."""
    entries = tuple(entry for entry in study.ENTRIES if entry.name in ("SGD", "SAM (rho 0.2)"))
    result = study.run(study.Setting(0.4, 40, (0,), entries))
    sgd, sam = (row.runs[0] for row in result.rows)
    assert sam.test_accuracy > sgd.test_accuracy + 10
    assert sam.eigenvalue < sgd.eigenvalue / 3
    assert sam.train_accuracy < sgd.train_accuracy
    assert "40 % of their labels wrong" in report.table(result)


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
