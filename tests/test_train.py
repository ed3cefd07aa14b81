"""The training study on synthetic images and a narrow net: it runs, counts, writes, stops and goes on bit-exactly."""

from __future__ import annotations

import csv
import io
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("PIL")

import numpy as np
from PIL import Image

import samkern
from bench import cifar, nets, shapes, train, train_log, train_run
from bench.step_clock import Step, StepClock
from samkern.reporting import Run

TIMES = {"seconds", "ms_per_step", "own_share", "time"}  # columns that differ from run to run
ROWS = {
    "options": "", "seed": 0, "epochs": 3, "images": 1000, "batch": 100, "width": 64, "train_loss": 1.0, "train_accuracy": 95.0,
    "test_accuracy": 90.0, "gap": 5.0, "seconds": 1.0, "own_share": 0.1, "backend": "cpu", "compiled": False, "device": "x",
    "torch": "2", "samkern": "0", "commit": "c", "time": "t",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    """The nets are too narrow to share, and threads that wait for a busy machine take seconds for a step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def passes(monkeypatch):
    """How many forward passes in training mode each net has had, in the order in which they were made."""
    counts = []
    make = nets.resnet18

    def counted(width):
        net, mine = make(width), len(counts)
        counts.append(0)

        def count(module, inputs):
            counts[mine] += module.training

        net.register_forward_pre_hook(count)
        return net

    monkeypatch.setattr(nets, "resnet18", counted)
    return counts


def smoke(folder, *arguments):
    always = ["--smoke", "--no-report", "--width", "2", "--results", str(folder / "results")]
    return train.main([*always, *map(str, arguments)])


def written(folder):
    (path,) = (folder / "results").glob("*/train.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def on_record(folder):
    """The run's epochs and steps, without what differs from run to run."""
    (path,) = (folder / "results").glob("*/runs/*/*")
    run = Run.read(path)
    assert [row["seconds"] for row in run.epochs] == sorted(row["seconds"] for row in run.epochs)
    assert set(run.measures) == {"epsilon sharpness", "adaptive sharpness", "fisher rao"}
    assert run.measures["fisher rao"].value > 0
    return [{name: row[name] for name in row if name not in TIMES} for row in run.epochs], run.steps


def test_all_methods_run_and_their_pairs_are_those_that_were_taken(tmp_path, capsys, passes):
    assert smoke(tmp_path, "--images", 192) == 0
    rows = written(tmp_path)
    names = list(train_run.methods())
    assert [(row["method"], row["epoch"]) for row in rows] == [(name, epoch) for name in names for epoch in "12"]
    assert [int(row["pairs"]) for row in rows if row["epoch"] == "2"] == passes
    assert passes[names.index("sgd")] == 6
    assert passes[names.index("sam")] == 12
    assert passes[names.index("looksam")] == 6 + 2  # it looks in steps 0 and 5 of 6
    assert passes[names.index("msam")] == 6
    assert passes[names.index("letssam")] == 2 * 4  # 19 images of 192 are held out, which leaves two batches
    text = capsys.readouterr().out
    for row in rows:
        assert float(row["gap"]) == pytest.approx(float(row["train_accuracy"]) - float(row["test_accuracy"]), abs=2e-3)
        assert 0 < float(row["own_share"]) < 1
        assert float(row["ms_per_step"]) > 0
        assert math.isfinite(float(row["train_loss"]))
        assert f"\n{row['method']} " in text
    assert [row["backend"] == "torch" for row in rows] == [row["method"] == "sgd" for row in rows]


def test_all_methods_see_the_same_batches_and_learn(tmp_path):
    assert smoke(tmp_path, "--width", 4, "--epochs", 5, "--method", "sgd", "--method", "sam", "--option", "rho=0") == 0
    rows = written(tmp_path)
    sgd, sam = (float(row["train_loss"]) for row in rows[::5])
    assert sgd == pytest.approx(sam, rel=1e-4)  # SAM of radius 0 is SGD, until roundings have grown
    assert all(float(row["train_accuracy"]) > 50 for row in rows[4::5])


def test_methods_are_those_of_the_package(monkeypatch):
    class Newest(samkern.SAM):
        pass

    assert {"sgd", "sam", "samk", "asam", "looksam", "looklayersam"} <= set(train_run.methods())
    assert "sharpnessaware" not in train_run.methods()
    monkeypatch.setattr(samkern, "Newest", Newest, raising=False)
    monkeypatch.setattr(samkern, "__all__", [*samkern.__all__, "Newest"])
    assert train_run.methods()["newest"] is Newest


RESUMED = [
    ["sgd"],
    ["looksam", "--option", "k=3"],
    ["letssam", "--option", "period=2", "--images", "288"],  # 4 batches without the tenth that is held out
]


@pytest.mark.parametrize("method", RESUMED, ids=lambda method: method[0])
def test_a_stopped_run_goes_on_to_the_same_bits(method, tmp_path, monkeypatch, capsys, passes):
    arguments = ["--epochs", 3, "--method", *method, "--checkpoints"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert smoke(whole, *arguments, whole) == 0

    owner = train_run.methods()[method[0]]
    step, calls = owner.step, []

    def interrupted(self, closure, **others):
        calls.append(1)
        if len(calls) == 7:  # of 4 in an epoch: in the second
            closure()
            raise KeyboardInterrupt
        return step(self, closure, **others)

    monkeypatch.setattr(owner, "step", interrupted)
    assert smoke(stopped, *arguments, stopped) == 130
    monkeypatch.setattr(owner, "step", step)
    assert "--resume" in capsys.readouterr().err
    assert [row["epoch"] for row in written(stopped)] == ["1"]

    assert smoke(stopped, *arguments, stopped, "--resume") == 0
    assert "goes on after epoch 1 of 3" in capsys.readouterr().out
    ours, theirs = (torch.load(next(folder.glob("*.pt")), weights_only=True) for folder in (stopped, whole))
    for part in ("net", "opt", "schedule", "generators", "pairs", "setting"):
        assert_same(ours[part], theirs[part])
    for row, other in zip(written(stopped), written(whole), strict=True):
        assert {name: row[name] for name in row if name not in TIMES} == {n: other[n] for n in other if n not in TIMES}
    assert float(written(stopped)[-1]["seconds"]) > float(written(stopped)[0]["seconds"])
    epochs, steps = on_record(whole)
    assert on_record(stopped) == (epochs, steps)  # nothing lost, nothing twice
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert [row["step"] for row in steps] == ([] if method[0] == "sgd" else list(range(12)))

    before = sum(passes)
    path = next((stopped / "results").glob("*/train.csv"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # stopped between checkpoint and row
    assert smoke(stopped, *arguments, stopped, "--resume") == 0
    assert sum(passes) == before  # complete: nothing is trained, and the missing row is there again
    assert [row["epoch"] for row in written(stopped)] == ["1", "2", "3"]
    assert on_record(stopped) == (epochs, steps)


def test_the_page_of_a_study(tmp_path, capsys, monkeypatch):
    assert smoke(tmp_path, "--report", "--epochs", 1, "--method", "sgd", "--method", "sam", "--seeds", 0, 1) == 0
    path = next(line for line in capsys.readouterr().out.splitlines() if line.endswith("report.html"))
    page = Path(path).read_text()
    assert "4 runs" in page
    assert all(f"<span>{name}" in page for name in ("sgd", "sam"))
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    train.write_page([Path(path).parent / "sgd-seed0"])
    assert "no report: plotly is not installed" in capsys.readouterr().out


def assert_same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, list):
        for value, other in zip(ours, theirs, strict=True):
            assert_same(value, other)
    else:
        assert ours == theirs


def test_a_checkpoint_of_another_setting_is_refused(tmp_path):
    run = ["--method", "sgd", "--epochs", 1, "--checkpoints", tmp_path]
    assert smoke(tmp_path, *run) == 0
    with pytest.raises(SystemExit, match=r"was made with lr 0\.1, this run has 0\.2; drop --resume"):
        smoke(tmp_path, *run, "--lr", 0.2, "--resume")


def test_a_csv_of_another_version_is_left_alone(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("method,loss\nsgd,1\n")
    with pytest.raises(train_log.StudyError, match="has other columns"):
        train_log.append(path, [])
    assert path.read_text() == "method,loss\nsgd,1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "rho=1"], "must come after the --method"),
        (["--method", "sam", "--option", "rho"], "must be NAME=VALUE"),
        (["--method", "sam", "--option", "rho=-1"], "rho must be a finite number >= 0, got -1"),
        (["--method", "sam", "--option", "roh=1"], "unexpected keyword argument 'roh'"),
        (["--method", "adam"], "invalid choice: 'adam'"),
        (["--images", "10"], "--images must be at least a batch of 64, got 10"),
        (["--images", "70", "--method", "letssam"], "--images must leave letssam a batch of 64 beside its validation"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--resume"], "--resume needs --checkpoints"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        smoke(tmp_path, *arguments)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_are_python_values():
    texts = ["0.1", "5", "True", "inf", "tensor", "bfloat16"]
    assert [train.option_value(text) for text in texts] == [0.1, 5, True, math.inf, "tensor", torch.bfloat16]


# ---- data


def write_npz(path, images, n_test=1, **changed):
    """``images`` as a data file; the last ``n_test`` are test images. Returns what Pillow reads back."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "label": (np.arange(len(images)) % 10).astype(np.uint8),
        "is_test": np.arange(len(images)) >= len(images) - n_test,
    }
    np.savez(path, **{name: value for name, value in {**arrays, **changed}.items() if value is not None})
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


def random_images(n, side=32):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_a_file_is_decoded_and_kept(tmp_path, monkeypatch):
    path, cache = tmp_path / "tiny.npz", tmp_path / "cache"
    expected = torch.from_numpy(np.stack(write_npz(path, random_images(1003), n_test=2)))
    data = cifar.load(path, cache, n_train=1001)
    assert torch.equal(data.train_x, expected[:1001])
    assert torch.equal(data.test_x, expected[1001:])
    assert data.train_y.tolist() == [i % 10 for i in range(1001)]
    assert data.test_y.tolist() == [1, 2]
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(cifar, "decode", None)  # is not called again
    assert torch.equal(cifar.load(path, cache, n_train=20).train_x, expected[:20])
    with pytest.raises(cifar.DataError, match="has 1,001 training images, 1,002 were asked for"):
        cifar.load(path, cache, n_train=1002)


def test_grey_images_become_rgb(tmp_path):
    write_npz(tmp_path / "grey.npz", random_images(3)[..., 0])
    images, _, _ = cifar.decode(tmp_path / "grey.npz")
    assert images.shape == (3, 32, 32, 3)
    assert torch.equal(images[..., 0], images[..., 2])


def test_without_a_data_file(tmp_path, monkeypatch):
    monkeypatch.delenv("SAMKERN_DATA", raising=False)
    with pytest.raises(SystemExit, match=r"^there is no data file: set SAMKERN_DATA or --data .*$"):
        train.main(["--quick", "--results", str(tmp_path)])
    monkeypatch.setenv("SAMKERN_DATA", str(tmp_path / "nowhere.npz"))
    with pytest.raises(SystemExit, match=r"^.*nowhere\.npz does not exist: set SAMKERN_DATA or --data .*$"):
        train.main(["--quick", "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda path: path.write_text("not an archive"), ""),
        (lambda path: write_npz(path, random_images(3), label=None), "label is not a file in the archive"),
        (lambda path: write_npz(path, random_images(3), offset=np.zeros(3, np.int64)), "3 labels, 3 offsets"),
        (lambda path: write_npz(path, random_images(3), label=np.full(3, 10, np.uint8)), "a class above 9"),
        (lambda path: write_npz(path, random_images(3), jpeg=np.zeros(9999, np.uint8)), "cannot identify image file"),
        (lambda path: write_npz(path, random_images(3, side=28)), "image 0 is 28 x 28, expected 32 x 32"),
    ],
    ids=["text", "array_missing", "lengths", "classes", "no_jpeg", "size"],
)
def test_a_malformed_file(broken, why, tmp_path):
    path = tmp_path / "data.npz"
    broken(path)
    with pytest.raises(
        SystemExit, match=f"data.npz is not the npz with CIFAR-10 that bench/cifar.py describes: .*{why}"
    ):
        train.main(["--data", str(path), "--cache", str(tmp_path / "cache"), "--results", str(tmp_path / "results")])
    assert not (tmp_path / "cache").exists()


def test_batches_are_shifted_and_mirrored_images():
    data = cifar.synthetic(30, 10)
    taken, mirrored = [], 0
    for x, y in cifar.batches(data, batch=8, seed=0, epoch=1):
        assert x.is_contiguous(memory_format=torch.channels_last)
        mean, std = data.moments
        pixels = (x.permute(0, 2, 3, 1) * std + mean).round().to(torch.uint8)
        for image, label in zip(pixels, y, strict=True):
            ((i, flipped),) = origins(image, data.train_x)
            assert data.train_y[i] == label
            taken.append(i)
            mirrored += flipped
    assert len(taken) == len(set(taken)) == 24  # three full batches of 30 images
    assert 4 < mirrored < 20


def origins(image, images):
    """Which of ``images`` can be shifted and mirrored so that it is ``image``: slowly, one shift after another."""
    found = []
    for flipped in (False, True):
        upright = image.flip(1) if flipped else image
        for dy in range(-4, 5):
            for dx in range(-4, 5):
                moved = torch.zeros_like(images)
                to_y, to_x = slice(max(0, -dy), 32 - max(0, dy)), slice(max(0, -dx), 32 - max(0, dx))
                from_y, from_x = slice(max(0, dy), 32 - max(0, -dy)), slice(max(0, dx), 32 - max(0, -dx))
                moved[:, to_y, to_x] = images[:, from_y, from_x]
                same = (moved == upright).flatten(1).all(1)
                found += [(i, flipped) for i in same.nonzero().flatten().tolist()]
    return found


def test_images_that_are_held_out():
    data = cifar.synthetic(30, 10)
    rest, held_out = data.held_out(6)
    assert torch.equal(torch.cat([rest.train_x, held_out.train_x]), data.train_x)
    assert len(held_out.train_y) == 6
    assert len(held_out.test_y) == 0  # test images are never validation data
    drawn = cifar.draws(held_out, batch=4, n_batches=3, seed=0, epoch=1)
    assert drawn.shape == (3, 4)
    assert int(drawn.max()) < 6
    torch.manual_seed(7)
    assert torch.equal(cifar.draws(held_out, 4, 3, 0, 1), drawn)
    assert not torch.equal(cifar.draws(held_out, 4, 3, 0, 2), drawn)


def test_batches_depend_on_seed_and_epoch_alone():
    data = cifar.synthetic(30, 10)

    def first(seed, epoch):
        return next(cifar.batches(data, 8, seed, epoch))[0]

    expected = first(0, 1)
    torch.manual_seed(7)
    assert torch.equal(first(0, 1), expected)
    assert not torch.equal(first(0, 2), expected)
    assert not torch.equal(first(1, 1), expected)


# ---- net, learning rate, measurements


def test_the_net_is_the_resnet18_of_the_shape_sets():
    net = nets.resnet18()
    assert sorted(tuple(p.shape) for p in net.parameters()) == sorted(shapes.resnet18())
    assert sum(p.numel() for p in net.parameters()) == 11_173_962


def test_the_learning_rate_rises_and_falls():
    setting = train_run.Setting(epochs=10, images=100, batch=10, width=64)
    factors = [setting.lr_factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.001


def test_times_are_weighted_by_kind_of_step():
    """Eight steps of 10 ms with one pair, two of 20 ms with two; a hiccup in one of them does not count."""
    clock = StepClock(torch.device("cpu"))
    clock.steps = [Step(0.0, 0.010, [(0.001, 0.009)]) for _ in range(8)] + [
        Step(0.0, 0.020, [(0.0, 0.007), (0.010, 0.017)]) for _ in range(2)
    ]
    clock.steps[3] = Step(0.0, 9.0, [(0.0, 8.0)])
    milliseconds, own_share = clock.summary()
    assert milliseconds == pytest.approx((8 * 10 + 2 * 20) / 10)
    assert own_share == pytest.approx(1 - (8 * 8 + 2 * 14) / (8 * 10 + 2 * 20))


def rows_of(method, pairs_per_epoch, milliseconds, **changed):
    """A run of three epochs of ten steps, of which the first warms up."""
    return [
        train_log.Row(
            **{**ROWS, **changed}, method=method, epoch=epoch, pairs=epoch * pairs_per_epoch, ms_per_step=ms
        )
        for epoch, ms in ((1, 500.0), (2, milliseconds), (3, milliseconds))
    ]  # fmt: skip


def test_the_table_compares_with_sgd():
    runs = [
        rows_of("sgd", 10, 10.0),
        rows_of("sam", 20, 20.5, options="rho=0.1"),
        rows_of("looksam", 12, 12.6, options="k=5"),
        rows_of("looksam", 12, 12.6, options="k=5", seed=1, test_accuracy=92.0),
    ]
    sgd, sam, looksam = (" ".join(line.split()) for line in train_log.table(runs).splitlines()[4:7])
    assert sgd == "sgd 90.00 5.00 1.000 10.000 10.0 % 1.000 x +0.0 %"
    assert sam == "sam rho=0.1 90.00 5.00 2.000 20.500 10.0 % 2.050 x +2.5 % within the bar"
    assert looksam == "looksam k=5 91.00 +- 1.41 5.00 1.200 12.600 10.0 % 1.260 x +5.0 % over the bar"
    alone = train_log.table(runs[1:2]).splitlines()[4]
    assert alone.split()[-3:] == ["-", "-", "-"]
