"""Run folders: what is written is read, a run that goes on loses nothing and has nothing twice, what is broken is named."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

import samkern
from samkern.reporting import NoRunsError, Run, RunFolder, UnreadableRunError, read_runs, runs, slug, to_tensorboard
from samkern.sharpness import Measurement

from .problems import closure_for, make_net


def looksam(net):
    return samkern.LookSAM(net.parameters(), torch.optim.SGD, lr=0.1, k=2)


def take_steps(net, opt, history, n):
    for _ in range(n):
        loss = opt.step(closure_for(net, opt.steps, opt.zero_grad))
        history.record(loss=loss)


@pytest.fixture
def run(tmp_path):
    return RunFolder(
        tmp_path / "looksam-seed3", method="LookSAM", seed=3, settings={"k": 2, "warm": None, "eta": math.inf}
    )


def landscape():
    numpy = pytest.importorskip("numpy")
    a = numpy.linspace(-1, 1, 5)
    return samkern.landscape.Landscape("surface", "the end", a, a, loss=a[:, None] ** 2 + a**2)


# ---- what is written is read


def test_everything_comes_back(run):
    net = make_net()
    opt = looksam(net)
    with run.history(opt) as history:
        take_steps(net, opt, history, 4)
    run.epoch(1, steps=2, pairs=3, seconds=0.5, train_loss=torch.tensor(2.5), test_accuracy=50, own=1.25)
    run.epoch(2, steps=4, pairs=6, seconds=1.0, train_loss=math.nan, test_loss=math.inf, test_accuracy=None, later=True)
    run.measure("trace", Measurement(3.0, math.nan, (3.0,)))
    run.measures({"trace": Measurement(4.0, 0.5, (3.5, 4.5)), "lambda": math.inf})
    run.landscape(landscape())
    found = Run.read(run.path)
    assert (found.name, found.method, found.seed) == ("looksam-seed3", "LookSAM", 3)
    assert found.settings == {"k": 2, "warm": None, "eta": "inf"}
    assert found.environment["torch"] == torch.__version__
    assert found.environment["threads"] == torch.get_num_threads()
    assert [(row["step"], row["decision"], row["evaluations"]) for row in found.steps] == [
        (0, "look", 2),
        (1, "reuse", 3),
        (2, "look", 5),
        (3, "reuse", 6),
    ]
    first, second = found.epochs
    assert (first["train_loss"], first["own"], first["later"]) == (2.5, 1.25, None)
    assert math.isnan(second["train_loss"])
    assert (second["test_loss"], second["test_accuracy"], second["own"], second["later"]) == (math.inf, None, None, 1)
    assert found.measures["trace"] == Measurement(4.0, 0.5, (3.5, 4.5))
    assert found.measures["lambda"].value == math.inf
    (plane,) = found.load_landscapes()
    assert (plane.loss == landscape().loss).all()
    assert not list(run.path.rglob("*.tmp"))
    json.loads((run.path / "run.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON


def test_a_folder_with_a_history_is_a_run(tmp_path):
    net = make_net()
    opt = looksam(net)
    (tmp_path / "sam-seed7").mkdir()
    (tmp_path / "sam-seed7" / "other.csv").write_text("a,b\n1,2\n")
    with samkern.history.History(opt, tmp_path / "sam-seed7" / "whatever.csv") as history:
        take_steps(net, opt, history, 2)
    with (tmp_path / "sam-seed7" / "whatever.csv").open("a") as file:
        file.write("2,lo")  # killed in the middle of a row
    (found,) = read_runs(tmp_path)
    assert (found.method, found.seed, len(found.steps)) == ("sam", 7, 2)


def test_runs_come_in_the_order_in_which_they_began(tmp_path):
    for name in ("b-seed10", "b-seed9", "a"):
        RunFolder(tmp_path / "group" / name)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "epochs.csv").write_text("epoch,test_accuracy\n1,50\n")
    (tmp_path / "empty").mkdir()
    names = ["b-seed10", "b-seed9", "a", "bare"]
    assert [run.name for run in read_runs(tmp_path)] == names
    assert [run.name for run in read_runs([tmp_path / "group" / "a", tmp_path, str(tmp_path / "group")])] == names


# ---- a run that goes on


def test_a_resumed_run_goes_on(run):
    net = make_net()
    opt = looksam(net)
    with run.history(opt) as history:
        for epoch in range(1, 4):
            take_steps(net, opt, history, 2)
            run.epoch(epoch, train_loss=epoch)
            if epoch == 1:
                kept = opt.state_dict()
    began = Run.read(run.path).started
    again = RunFolder(run.path, method="LookSAM", seed=3)
    opt = looksam(net)
    opt.load_state_dict(kept)
    assert [row["epoch"] for row in Run.read(run.path).epochs] == [1, 2, 3]
    with again.history(opt) as history:
        take_steps(net, opt, history, 2)
        again.epoch(2, train_loss=20)
    found = Run.read(run.path)
    assert [(row["epoch"], row["train_loss"]) for row in found.epochs] == [(1, 1), (2, 20)]
    assert [row["step"] for row in found.steps] == [0, 1, 2, 3]
    assert found.started == began
    assert len(json.loads((run.path / "run.json").read_text())["resumed"]) == 1


def test_a_run_from_the_start_takes_the_place_of_the_old_one(run):
    net = make_net()
    with run.history(looksam(net)) as history:
        take_steps(net, history._optimizer, history, 3)
    with run.history(looksam(net)) as history:  # an optimizer without steps, other scalars
        history._optimizer.step(closure_for(net, 0, lambda: None))
        history.record(own=1.0)
    assert [(row["step"], row["own"]) for row in Run.read(run.path).steps] == [(0, 1)]
    run.epoch(1)
    run.measure("a", 1.0)
    run.landscape(landscape())
    (run.path / "mine.txt").write_text("kept")
    RunFolder(run.path, method="another", resume=False)
    found = Run.read(run.path)
    assert (found.method, found.steps, found.epochs, found.measures, found.landscapes) == ("another", [], [], {}, ())
    assert (run.path / "mine.txt").exists()


@pytest.mark.parametrize("other", [{"method": "SAM", "seed": 3}, {"method": "LookSAM", "seed": 4}])
def test_another_run_is_not_continued(run, other):
    before = (run.path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"(method|seed) must be .* give another folder, or resume=False"):
        RunFolder(run.path, **other)
    assert (run.path / "run.json").read_bytes() == before


def test_a_killed_write_leaves_the_old_file(run, monkeypatch):
    run.epoch(1, train_loss=1.0)
    before = (run.path / "epochs.csv").read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(run.path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.epoch(2, train_loss=0.5)
    assert (run.path / "epochs.csv").read_bytes() == before
    assert not list(run.path.glob("*.tmp"))


# ---- mistakes


@pytest.mark.parametrize("value", ["1", torch.ones(2), 1j])
def test_what_is_no_number(run, value):
    with pytest.raises(TypeError, match="train_loss must be a real number or tensor of one entry, got"):
        run.epoch(1, train_loss=value)
    with pytest.raises(TypeError, match="x must be a real number"):
        run.measure("x", value)
    assert not (run.path / "epochs.csv").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[]"),
        ("run.json", '{"settings": 3}'),
        ("epochs.csv", "a,b\n1,2\n"),
        ("measures.json", "{"),
        ("measures.json", '{"a": {"standard_error": 1}}'),
        ("landscapes/x.npz", "no zip"),
    ],
)
def test_a_broken_file_is_named(run, name, content):
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(UnreadableRunError) as caught:
        read_runs(run.path)[0].load_landscapes()
    assert str(path) in str(caught.value)
    assert "move it away" in str(caught.value)


def test_where_no_run_is(tmp_path):
    with pytest.raises(
        NoRunsError, match=r"looked for run\.json, epochs\.csv, or a CSV file of a samkern\.history\.History"
    ):
        read_runs(tmp_path)
    with pytest.raises(NoRunsError, match="is no folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="at least one folder"):
        read_runs([])


def test_where_a_run_was_made(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.environment(torch.device("cpu"))["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert runs.environment(torch.device("cpu"))["commit"] is None
    facts = runs.environment(torch.device("cpu"), "abc")
    assert facts["commit"] == "abc"
    assert facts["backend"] in samkern.backends()
    assert all(isinstance(value, (str, int)) for value in facts.values())


def test_names_as_folders():
    assert slug("SAM (rho 0.2)") == "sam-rho-0.2"
    assert slug("../../etc") == "etc"
    assert slug("<b>/%") == "b"
    assert slug("//") == "run"
    assert os.sep not in slug("a/b")


# ---- TensorBoard


def test_tensorboard(tmp_path, run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    net = make_net()
    opt = looksam(net)
    with run.history(opt) as history:
        take_steps(net, opt, history, 2)
    run.epoch(1, pairs=3, test_accuracy=50.0, train_loss=math.nan)
    run.epoch(2, pairs=6, test_accuracy=75.0)
    run.measure("top eigenvalue", Measurement(8.0, 0.5))
    RunFolder(tmp_path / "b" / "looksam-seed3").epoch(1, pairs=1)
    for _ in range(2):  # the second in place of the first
        folders = to_tensorboard(tmp_path, tmp_path / "logs")
    assert [path.name for path in folders] == ["looksam-seed3", "looksam-seed3-2"]
    events = accumulator.EventAccumulator(str(folders[0])).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["samkern/decision"] == [(0, 2.0), (1, 1.0)]
    assert scalars["samkern/evaluations"] == [(0, 2.0), (1, 3.0)]
    assert scalars["epoch/test_accuracy"] == [(1, 50.0), (2, 75.0)]
    assert scalars["measure/top eigenvalue"] == [(0, 8.0)]
    assert scalars["measure/top eigenvalue standard error"] == [(0, 0.5)]
    assert len(scalars["loss"]) == 2
    (text,) = events.Tensors("run/text_summary")
    assert b"LookSAM, seed 3" in text.tensor_proto.string_val[0]
