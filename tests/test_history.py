"""A run on record: what is written is what happened, nothing is read from the device before, and files are continued."""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
import pickle
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import samkern
from samkern.history import COLUMNS, History
from samkern.optim import Budget, EveryK, SharpnessAware

from .problems import closure_for, make_net, train, weights

SGD = {"base": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
MAKERS = {
    "SAM": lambda params: samkern.SAM(params, **SGD),
    "SAMk": lambda params: samkern.SAMk(params, k=2, **SGD),
    "LookSAM": lambda params: samkern.LookSAM(params, k=2, **SGD),
    "AESAM": lambda params: samkern.AESAM(params, total_steps=10, **SGD),
    "AELookSAM": lambda params: samkern.AELookSAM(params, total_steps=10, **SGD),
    "ARSAM": lambda params: samkern.ARSAM(params, window=4, warmup_steps=2, **SGD),
    "LETSSAM": lambda params: samkern.LETSSAM(params, period=2, **SGD),
    "MSAM": lambda params: samkern.MSAM(params, **SGD),
    "GRST": lambda params: samkern.GRST(params, **SGD),
    "SSAMF": lambda params: samkern.SSAMF(params, fisher="batch", refresh_interval=2, **SGD),
    "own_step": lambda params: samkern.ASAM(params, torch.optim.RMSprop, lr=0.01),
}


class Board:
    """What a ``SummaryWriter`` is asked to do."""

    def __init__(self):
        self.scalars, self.flushes = [], 0

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self):
        self.flushes += 1


class Calls(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self):
        return sum(self.counts[name] for name in ("_local_scalar_dense", "_to_copy", "item", "is_nonzero", "equal"))


def step(net, opt, t=0):
    closure = closure_for(net, t, opt.zero_grad)
    validation = {"val_closure": closure_for(net, t + 50, opt.zero_grad)} if opt.learned is not None else {}
    return opt.step(closure, **validation)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def number(text):
    return None if text == "" else float(text)


# ---- what is written


@pytest.mark.parametrize("name", MAKERS)
def test_every_method_is_written_as_it_was(name, tmp_path):
    net = make_net()
    opt, path, expected = MAKERS[name](net.parameters()), tmp_path / "run.csv", []
    with History(opt, path, flush_every=3) as history:
        for t in range(8):
            loss, record = step(net, opt, t), opt.last_step
            keeps = opt.reuse is not None and opt.reuse.keeps
            expected.append(
                {
                    "step": t,
                    "decision": "look" if record.looked else "reuse" if record.reuses and keeps else "plain",
                    "evaluations": opt.evaluations,
                    "grad_norm": float(record.grad_norm),
                    "second_norm": float(record.second_norm) if record.looked else None,
                    "perturb_norm": float(record.perturb_norm) if record.looked else None,
                    "radius": float(opt.radius),
                    "skipped": 0,
                    "reason": "",
                    "lr": opt.param_groups[0]["lr"],
                    "loss": float(loss),
                }
            )
            history.record(loss=loss)
    rows = rows_of(path)
    assert tuple(rows[0]) == (*COLUMNS, "loss")
    for row, values in zip(rows, expected, strict=True):
        for key, value in values.items():
            assert row[key] == value if isinstance(value, str) else number(row[key]) == value, key
    looks = sum(row["decision"] == "look" for row in rows)
    assert number(rows[-1]["rate"]) == getattr(opt.schedule, "rate", looks / 8)


def test_the_radius_is_the_one_of_its_step(tmp_path):
    """A learned radius is a tensor that is written in place."""
    net = make_net()
    opt = samkern.LETSSAM(net.parameters(), beta=10.0, period=1, **SGD)
    seen = []
    with History(opt, tmp_path / "run.csv") as history:
        for t in range(4):
            step(net, opt, t)
            seen.append(float(opt.radius))
            history.record()
    assert [number(row["radius"]) for row in rows_of(tmp_path / "run.csv")] == seen
    assert len(set(seen)) > 1


def test_radius_lr_and_scalars_are_those_of_the_moment(tmp_path):
    net = make_net()
    opt, total = samkern.SAM(net.parameters(), torch.optim.SGD, lr=torch.tensor(0.5)), torch.zeros(1)
    with History(opt, tmp_path / "run.csv") as history:
        for t in range(3):
            step(net, opt, t)
            total += 1
            opt.param_groups[0]["lr"].mul_(0.5)
            opt.param_groups[0]["rho"] = 0.1 * t
            history.record(total=total, epoch=t, done=torch.tensor(t == 2), share=None if t else 0.25)
    rows = rows_of(tmp_path / "run.csv")
    assert [number(row["lr"]) for row in rows] == [0.25, 0.125, 0.0625]
    assert [number(row["radius"]) for row in rows] == [0.0, 0.1, 0.2]
    assert [row["total"] for row in rows] == ["1.0", "2.0", "3.0"]
    assert [(row["epoch"], row["done"], row["share"]) for row in rows] == [
        ("0", "0", "0.25"),
        ("1", "0", ""),
        ("2", "1", ""),
    ]


@pytest.mark.parametrize(("in_pass", "where"), [(1, "a gradient at w "), (2, "a gradient at w + eps")])
def test_a_skipped_step_says_why(in_pass, where, tmp_path):
    net = make_net()
    opt = samkern.SAM(net.parameters(), **SGD)
    closure, calls = closure_for(net, 0, opt.zero_grad), []

    def poisoned():
        loss = closure()
        calls.append(1)
        if len(calls) == in_pass:
            net.head.weight.grad[0, 0] = math.nan
        return loss

    with History(opt, tmp_path / "run.csv") as history:
        opt.step(poisoned)
        history.record()
        opt.step(lambda: opt.zero_grad())
        history.record()
    skipped, nothing = rows_of(tmp_path / "run.csv")
    assert skipped["skipped"] == "1"
    assert skipped["reason"].startswith(where)
    assert nothing["reason"] == "no parameter had a gradient"


def test_steps_in_halves_in_parts_and_within_perturbed(tmp_path):
    net = make_net()
    sam, msam = samkern.SAM(net.parameters(), **SGD), samkern.MSAM(net.parameters(), **SGD)
    with History(sam, tmp_path / "sam.csv") as history:
        closure_for(net, 0, sam.zero_grad)()
        sam.first_step()
        with pytest.raises(RuntimeError, match="between first_step"):
            history.record()
        closure_for(net, 0, lambda: None)()
        sam.second_step()
        history.record()
        sam.step([closure_for(net, t, sam.zero_grad) for t in range(2)])
        history.record()
    with History(msam, tmp_path / "msam.csv") as history:
        with msam.perturbed():
            closure_for(net, 0, msam.zero_grad)()
        msam.step()
        history.record()
    assert [row["evaluations"] for row in rows_of(tmp_path / "sam.csv")] == ["2", "4"]
    assert [row["evaluations"] for row in rows_of(tmp_path / "msam.csv")] == ["1"]


def test_rate(tmp_path):
    """The schedule's own; else the share of looks, before a file was continued too."""
    net = make_net()
    budget = SharpnessAware(net.parameters(), schedule=Budget(window=4, warmup_steps=0), **SGD)
    by_turns = SharpnessAware(net.parameters(), schedule=EveryK(2), **SGD)
    for opt, expected in ((budget, [0.25] * 3), (by_turns, [1.0, 0.5, 2 / 3])):
        path = tmp_path / f"{type(opt.schedule).__name__}.csv"
        for t in range(3):
            with History(opt, path) as history:
                step(net, opt, t)
                history.record()
        assert [number(row["rate"]) for row in rows_of(path)] == expected


# ---- what it costs, and whom


def test_nothing_is_read_between_flushes(tmp_path):
    net = make_net()
    opt = samkern.LETSSAM(net.parameters(), period=1, base=torch.optim.SGD, lr=torch.tensor(0.1))
    copies = []
    for n_steps in (4, 8):
        with History(opt, tmp_path / f"{n_steps}.csv", flush_every=n_steps) as history:
            for t in range(n_steps):
                loss = step(net, opt, t).requires_grad_()
                with Calls() as calls:
                    history.record(loss=loss, accuracy=torch.tensor([0.5]))
                if t < n_steps - 1:
                    assert calls.reads == 0
                    assert calls.counts["stack"] == 0
        assert calls.reads > 0
        copies.append(calls.counts["stack"])
    assert copies[0] == copies[1] <= 4  # one for what is alike, of however many steps


def test_the_training_is_the_same(tmp_path):
    net, twin = make_net(), make_net()
    opt, watched = samkern.LookSAM(net.parameters(), **SGD), samkern.LookSAM(twin.parameters(), **SGD)
    train(net, opt, range(4))
    with History(watched, tmp_path / "run.csv", flush_every=2) as history:
        for t in range(4):
            history.record(loss=step(twin, watched, t))
            pair = copy.deepcopy((twin, watched)), pickle.loads(pickle.dumps((twin, watched)))
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(twin), strict=True))
    assert opt.state_dict().keys() == watched.state_dict().keys()
    assert all(other.last_step is None for _, other in pair)


# ---- files


def test_rows_are_whole_and_on_disk_after_every_flush(tmp_path):
    net, path = make_net(), tmp_path / "run.csv"
    opt = samkern.SAM(net.parameters(), **SGD)
    history = History(opt, path, flush_every=2)
    for t in range(5):
        step(net, opt, t)
        history.record(loss=t)
        assert len(rows_of(path)) == (t + 1) // 2 * 2
        assert path.stat().st_size == 0 or path.read_text().endswith("\n")
    history.flush()
    history.close()
    history.close()
    assert [row["loss"] for row in rows_of(path)] == ["0", "1", "2", "3", "4"]
    step(net, opt)
    with pytest.raises(RuntimeError, match="closed history"):
        history.record(loss=1.0)


@pytest.mark.parametrize("error", [ValueError("of the training"), KeyboardInterrupt()], ids=repr)
def test_an_exception_leaves_what_was_recorded(error, tmp_path):
    net = make_net()
    opt = samkern.SAM(net.parameters(), **SGD)
    with pytest.raises(type(error)), History(opt, tmp_path / "run.csv") as history:
        step(net, opt)
        history.record()
        raise error
    assert len(rows_of(tmp_path / "run.csv")) == 1


def test_an_exception_is_not_replaced_by_that_of_a_full_disk(tmp_path):
    net = make_net()
    opt = samkern.SAM(net.parameters(), **SGD)
    with pytest.raises(KeyboardInterrupt) as caught, History(opt, tmp_path / "run.csv") as history:
        step(net, opt)
        history.record()
        (tmp_path / "run.csv").unlink()
        (tmp_path / "run.csv").mkdir()
        raise KeyboardInterrupt
    assert "the last 1 steps could not be written: IsADirectoryError" in caught.value.__notes__[0]


def test_a_file_is_continued(tmp_path):
    net, path = make_net(), tmp_path / "run.csv"
    opt = samkern.SAM(net.parameters(), **SGD)
    with History(opt, path) as history:
        for t in range(2):
            step(net, opt, t)
            history.record(loss=t, accuracy=0.5)
    with path.open("a") as file:
        file.write("2,look,6,0.1")  # the process was killed here
    resumed = samkern.SAM(net.parameters(), **SGD)
    resumed.load_state_dict(opt.state_dict())
    with History(resumed, str(path)) as history:
        step(net, resumed, 2)
        history.record(loss=2)
        step(net, resumed, 3)
        with pytest.raises(
            ValueError, match=r"acuracy has no column in .*run\.csv', whose scalars are: loss, accuracy"
        ):
            history.record(loss=3, acuracy=0.5)
        history.record(loss=3)
    rows = rows_of(path)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["evaluations"] for row in rows] == ["2", "4", "6", "8"]
    assert [row["accuracy"] for row in rows] == ["0.5", "0.5", "", ""]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "notes without an end", "step,decision\n", "\n"])
def test_another_file_is_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run.csv' has the columns .* give another path"):
        History(samkern.SAM(make_net().parameters(), **SGD), path)
    assert path.read_text() == content


# ---- TensorBoard


def test_tensorboard():
    net, board = make_net(), Board()
    opt = samkern.LookSAM(net.parameters(), k=2, **SGD)
    with History(opt, board, flush_every=2) as history:
        for t in range(3):
            step(net, opt, t)
            history.record(**{"train/loss": torch.tensor(0.5 + t)}, **({"accuracy": 1} if t == 2 else {}))
            assert bool(board.scalars) == (t > 0)
    by_tag = {}
    for tag, value, at in board.scalars:
        assert type(value) is float
        by_tag.setdefault(tag, {})[at] = value
    ours = {f"samkern/{name}" for name in COLUMNS} - {"samkern/step", "samkern/reason"}
    assert by_tag.keys() == ours | {"train/loss", "accuracy"}
    assert by_tag["samkern/decision"] == {0: 2.0, 1: 1.0, 2: 2.0}
    assert by_tag["train/loss"] == {0: 0.5, 1: 1.5, 2: 2.5}
    assert by_tag["accuracy"] == {2: 1.0}
    assert by_tag["samkern/second_norm"].keys() == {0, 2}
    assert board.flushes == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_itself(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net = make_net()
    opt = samkern.SAM(net.parameters(), **SGD)
    with SummaryWriter(tmp_path) as writer, History(opt, writer) as history:
        for t in range(3):
            step(net, opt, t)
            history.record(loss=torch.tensor(0.5 + t))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert [event.value for event in events.Scalars("samkern/evaluations")] == [2, 4, 6]


# ---- what is refused


def test_a_step_is_recorded_once(tmp_path):
    net = make_net()
    opt = samkern.SAM(net.parameters(), **SGD)
    with History(opt, tmp_path / "run.csv") as history:
        with pytest.raises(RuntimeError, match=r"before the first step: call it after opt\.step"):
            history.record()
        step(net, opt)
        history.record()
        with pytest.raises(RuntimeError, match="twice for step 0: call it once after each"):
            history.record()
    assert len(rows_of(tmp_path / "run.csv")) == 1


@pytest.mark.parametrize(
    ("scalars", "error", "message"),
    [
        (
            {"loss": torch.ones(2)},
            TypeError,
            r"loss must be .* got a torch.float32 tensor of shape \(2,\): pass its mean",
        ),
        ({"phase": "warm"}, TypeError, "phase must be a real number or tensor of one entry, got 'warm'"),
        ({"z": torch.ones((), dtype=torch.complex64)}, TypeError, "z must be"),
        ({"grad_norm": 1.0}, ValueError, "grad_norm is a column that samkern fills: give yours another name"),
        ({"accuracy": 1.0}, ValueError, r"accuracy has no column .* scalars are: loss\. Pass it from the first record"),
    ],
)
def test_scalars_that_are_none(scalars, error, message, tmp_path):
    net = make_net()
    opt = samkern.SAM(net.parameters(), **SGD)
    with History(opt, tmp_path / "run.csv") as history:
        step(net, opt)
        history.record(loss=1.0)
        step(net, opt)
        with pytest.raises(error, match=message):
            history.record(**scalars)
        history.record(loss=2.0)  # the step can still be recorded
    assert [row["loss"] for row in rows_of(tmp_path / "run.csv")] == ["1.0", "2.0"]


def test_arguments(tmp_path):
    net = make_net()
    opt, path = samkern.SAM(net.parameters(), **SGD), tmp_path / "run.csv"
    with pytest.raises(TypeError, match="optimizer must be one of samkern's, got SGD: wrap it"):
        History(torch.optim.SGD(net.parameters(), lr=0.1), path)
    with pytest.raises(TypeError, match=r"target must be a path or have add_scalar.*, got int: pass the path"):
        History(opt, 3)
    for every in (0, 2.5, True):
        with pytest.raises(ValueError, match="flush_every must be an integer >= 1, got"):
            History(opt, path, flush_every=every)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        History(opt, tmp_path / "nowhere" / "run.csv")
    assert not path.exists()
