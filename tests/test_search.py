"""The search of settings: on training data alone, with seeds of its own, and no run twice."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from bench import search
from samkern.demo import study


def test_a_fold_is_training_data():
    training = study.load(search.NOISE, 10)
    folds = [search.fold(seed) for seed in range(6, 12)]
    assert all(len(data.train_y) == 1000 and len(data.test_y) == 200 for data in folds)
    data = search.fold(10)
    images = {tuple(x.flatten().tolist()) for x in training.train_x}
    assert {tuple(x.flatten().tolist()) for x in torch.cat([data.train_x, data.test_x])} == images
    assert int((data.test_y != study.load(0.0, 10).train_y[800:1000]).sum()) > 40  # wrong ones among them
    assert not torch.equal(data.test_x, search.fold(11).test_x)


def test_a_search_writes_its_rows_and_goes_on(tmp_path, capsys):
    arguments = ["--method", "MSAM", "--epochs", "1", "--seeds", "10", "11", "--results", str(tmp_path)]
    assert search.main(arguments) == 0
    rows = search.read(tmp_path / "search.csv")
    assert [row["seed"] for row in rows] == ["10"] * 7 + ["11"] * 2  # the best two go on
    assert {row["pairs_per_step"] for row in rows} == {"1.0"}
    assert "MSAM rho=1.5" in capsys.readouterr().out
    assert search.main(arguments) == 0
    assert search.main(["--table", "--results", str(tmp_path)]) == 0
    assert search.read(tmp_path / "search.csv") == rows


def test_candidates_are_distinct_and_can_be_made():
    all_of_them = search.candidates()
    assert len({(c.method, c.written) for c in all_of_them}) == len(all_of_them)
    data = study.load(0.0, 0)
    for candidate in all_of_them:
        net = study.make_net(0)
        opt = candidate.make(study.Task(net, data.train_x, data.train_y, 100))
        assert isinstance(opt, torch.optim.Optimizer)


def test_the_table_is_sorted():
    def row(method, seed, accuracy):
        return {
            "method": method, "options": "k=2", "seed": str(seed), "epochs": "40", "held_out_accuracy": str(accuracy),
            "train_accuracy": "60", "pairs_per_step": "1.5",
        }  # fmt: skip

    lines = search.table([row("A", 1, 50.0), row("B", 1, 55.0), row("B", 2, 57.0)]).splitlines()
    assert lines[2].split() == ["56.00", "+-", "1.00", "60.0", "1.50", "2", "40", "B", "k=2"]
    assert lines[3].endswith("A k=2")


@pytest.mark.parametrize("method", ["LPFSGD", "SGD, averaged", "WASAM", "SAF", "MESA"])
def test_what_a_method_is_judged_by(method):
    """An average of the weights, if it has one, with statistics of BatchNorm of its own; afterwards the net is as it was."""
    candidate = next(c for c in search.candidates() if c.method == method)
    net = study.make_net(0)
    fit = study.Fit(study.Entry("", candidate.make, **candidate.rest), net, study.load(0.0, 0), 7, 0)
    *_, pairs = fit.run()
    assert pairs == fit.kinds.total() * (2 if method == "WASAM" else 1)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    with fit.tested():
        moved = {name for name, x in net.state_dict().items() if not torch.equal(x, before[name])}
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    weights = {name for name, _ in net.named_parameters()}
    if method in ("SAF", "MESA"):
        assert moved == set()
        assert fit._loss.is_active
    else:
        assert moved >= {name for name in before if "running" in name}
        assert (moved & weights == weights) == (method != "LPFSGD")
        assert (moved & weights == set()) == (method == "LPFSGD")
