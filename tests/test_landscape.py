"""Landscapes: what they compute where, that nothing is left behind, files that are resumed, figures and pages."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from samkern import landscape
from samkern.landscape import Landscape
from samkern.sharpness.problem import problem

from .lists import BF16, FP32, same_bits, seeded
from .oracles import landscape as oracle
from .problems import batch, make_net

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

DATA = [batch(0), batch(1)]


def state(seed):
    return copy.deepcopy(make_net(seed=seed).state_dict())


def trained_states(n=5):
    """Along a training, statistics of BatchNorm too."""
    net, states = make_net(), []
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for t in range(n):
        cross_entropy(net(batch(t)[0]), batch(t)[1]).backward()
        opt.step()
        opt.zero_grad()
        states.append(copy.deepcopy(net.state_dict()))
    return states


def direct_loss(net, data=DATA, tensors=None):
    net = copy.deepcopy(net).eval()
    if tensors is not None:
        net.load_state_dict(tensors)
    with torch.no_grad():
        return sum(cross_entropy(net(x), y).item() for x, y in data) / len(data)


class Plane(nn.Module):
    """``w[0] + 10 w[1]``: where a point is can be read off its loss."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return x * (self.w[0] + 10 * self.w[1])


AXES = ([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])])
ON_PLANE = {"loss_fn": lambda out, _: out, "data": [(torch.ones(()).double(), None)]}


# ---- where


@pytest.mark.parametrize("parallel", [1, 4])
def test_orientation(parallel):
    found = landscape.surface(Plane(), **ON_PLANE, directions=AXES, points=(5, 7), span=2.0, parallel=parallel)
    assert found.loss.shape == (5, 7)
    assert found.accuracy is None
    assert np.allclose(found.loss, found.a[:, None] + 10 * found.b[None, :])
    assert (found.a[2], found.b[3]) == (0, 0)


@pytest.mark.parametrize("points", [3, 9, 49, 99])
def test_the_centre_is_a_point(points):
    found = landscape.line(Plane(), **ON_PLANE, direction=AXES[0], points=points, span=0.3)
    assert found.a[points // 2] == 0.0
    assert found.loss[points // 2] == 0.0
    assert np.array_equal(found.a, -found.a[::-1])


@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16])
def test_the_centre_is_the_loss(dtype):
    net, data = make_net(dtype), [batch(0, dtype), batch(1, dtype)]
    found = landscape.surface(net, cross_entropy, data, points=3)
    with problem(net, cross_entropy, data) as p:
        assert found.loss[1, 1] == p.loss()
    logits = [copy.deepcopy(net).eval()(x).argmax(1) for x, _ in data]
    right = torch.cat([(z == y) for z, (_, y) in zip(logits, data, strict=True)]).double().mean().item()
    assert found.accuracy[1, 1] == pytest.approx(100 * right)
    assert len(np.unique(found.loss)) >= 6  # bfloat16 has three digits


def test_batches_count_by_their_samples():
    x, y = batch(0)
    net = make_net()
    whole = landscape.line(net, cross_entropy, [(x, y)], points=3)
    parts = landscape.line(net, cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])], points=3)
    assert np.allclose(whole.loss, parts.loss, rtol=1e-12)
    assert np.allclose(whole.accuracy, parts.accuracy, rtol=1e-12)


def test_accuracy_is_of_labels_that_count():
    """-100 is cross_entropy's ignore_index: no label. A batch may have none."""
    net = make_net()
    (x, y), (more, _) = batch(0), batch(1)
    y = y.clone()
    y[:5] = -100
    answers = copy.deepcopy(net).eval()(x).argmax(1)
    y[6:10] = answers[6:10]
    data = [(x[:8], y[:8]), (x[8:], y[8:]), (more, torch.full((12,), -100))]
    right = (answers[5:] == y[5:]).double().mean().item()
    sum_of = lambda out, y: cross_entropy(out, y, reduction="sum")  # noqa: E731
    for parallel in (1, 3):
        found = landscape.line(net, sum_of, data, points=3, parallel=parallel)
        assert found.accuracy[1] == pytest.approx(100 * right)


def test_no_accuracy_without_answers():
    net, data = nn.Linear(4, 3), [(torch.tensor([[1.0, -1.0, 1.0, 1.0]] * 6), torch.zeros(6, dtype=torch.int64))]
    far = [torch.full((3, 4), 1e38), torch.zeros(3)]
    found = landscape.line(net, cross_entropy, data, points=3, direction=far, span=10.0)
    assert np.isfinite(found.accuracy).tolist() == [False, True, False]  # inf - inf
    regression = landscape.line(nn.Linear(4, 1), lambda out, y: (out[:, 0] - y).square().mean(), data, points=3)
    assert regression.accuracy is None


def test_a_line_by_hand():
    net = make_net()
    [xi] = landscape.random_directions(net, seed=3)
    found = landscape.line(net, cross_entropy, DATA, points=5, span=0.5, seed=3)
    with torch.no_grad():
        for p, d in zip((p for p in net.parameters() if p.requires_grad), xi, strict=True):
            p += 0.25 * d
    assert found.loss[3] == pytest.approx(direct_loss(net), rel=1e-12)


def test_ends_of_an_interpolation():
    """Frozen weights and statistics of BatchNorm are those of the ends too."""
    states = trained_states()
    states[3]["frozen"] += 1
    net = make_net(seed=5)
    found = landscape.interpolate(net, cross_entropy, DATA, states[0], states[3], points=5)
    ends = [direct_loss(net, tensors=states[i]) for i in (0, 3)]
    assert found.loss[[0, -1]].tolist() == pytest.approx(ends, rel=1e-14)
    middle = {k: 0.5 * x + 0.5 * states[3][k] if x.is_floating_point() else x for k, x in states[0].items()}
    assert found.loss[2] == pytest.approx(direct_loss(net, tensors=middle), rel=1e-12)
    assert found.barrier == found.loss.max() - max(found.loss[0], found.loss[-1])


def test_statistics_are_estimated_anew_at_every_point():
    a, b = state(1), state(2)
    net = make_net()
    found = landscape.interpolate(net, cross_entropy, DATA, a, b, points=3, reestimate=True)
    given = landscape.interpolate(net, cross_entropy, DATA, a, b, points=3, reestimate=iter(DATA))
    for i, alpha in enumerate((0.0, 0.5, 1.0)):
        middle = {k: (1 - alpha) * x + alpha * b[k] if x.is_floating_point() else x for k, x in a.items()}
        there = copy.deepcopy(net)
        there.load_state_dict(middle)
        torch.optim.swa_utils.update_bn(DATA, there)
        assert found.loss[i] == pytest.approx(direct_loss(there), rel=1e-10)
    assert np.array_equal(found.loss, given.loss)
    assert found.loss[0] != pytest.approx(direct_loss(net, tensors=a), rel=1e-3)


def test_lists_leave_frozen_weights_alone():
    net = make_net()
    lists = [[p + k for p in net.parameters() if p.requires_grad] for k in (0, 1)]
    found = landscape.interpolate(net, cross_entropy, DATA, *lists, points=3)
    assert found.loss[0] == pytest.approx(direct_loss(net), rel=1e-14)


# ---- directions


def test_filter_norms():
    net = make_net()
    [xi] = landscape.random_directions(net, seed=1)
    own = [p.detach() for p in net.parameters() if p.requires_grad]
    for d, w in zip(xi, own, strict=True):
        if w.dim() < 2:
            assert not d.any()
        else:
            assert torch.allclose(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1), rtol=1e-12)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_directions_against_the_formulas(orthogonal):
    net = make_net()
    with problem(net, cross_entropy, DATA, seed=4) as p:
        raw = [[z.numpy() for z in p.normals(draw)] for draw in (0, 1)]
        own = [w.numpy() for w in p.weights]
    raw = [[z if z.ndim > 1 else 0 * z for z in direction] for direction in raw]
    if orthogonal:
        raw[1] = oracle.made_orthogonal(raw[1], raw[0])
        assert abs(sum((x * y).sum() for x, y in zip(*raw, strict=True))) < 1e-10
    found = landscape.random_directions(net, 2, orthogonal=orthogonal, seed=4)
    for direction, expected in zip(found, raw, strict=True):
        for x, y in zip(direction, oracle.filter_normalised(expected, own), strict=True):
            assert np.allclose(x.numpy(), y, rtol=1e-10, atol=1e-14)


def test_given_directions_may_be_normalised():
    net, [xi] = make_net(), landscape.random_directions(make_net())
    longer = [7 * x for x in xi]
    options = {"points": 3, "seed": 0}
    drawn = landscape.line(net, cross_entropy, DATA, **options)
    given = landscape.line(net, cross_entropy, DATA, direction=longer, normalise=True, **options)
    assert np.allclose(given.loss, drawn.loss, rtol=1e-12)
    assert not np.allclose(landscape.line(net, cross_entropy, DATA, direction=longer, **options).loss, drawn.loss)


# ---- planes


def test_plane_passes_through_its_checkpoints():
    net, states = make_net(), [state(k) for k in range(3)]
    found = landscape.plane(net, cross_entropy, DATA, states, points=(3, 5), margin=0.1)
    assert found.loss.shape == (3, 5)
    assert found.path_loss == pytest.approx([direct_loss(net, tensors=s) for s in states], rel=1e-10)
    flat = [torch.cat([s[name].flatten() for name, _ in net.named_parameters()]) for s in states]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(found.path[i] - found.path[j]) == pytest.approx((flat[i] - flat[j]).norm().item())
    assert found.path[0].tolist() == [0, 0]
    assert found.path[1, 1] == 0
    assert found.a[0] == pytest.approx(found.path[:, 0].min() - 0.1 * np.ptp(found.path[:, 0]))


def test_other_statistics_at_the_checkpoints():
    states = trained_states(3)
    with pytest.warns(UserWarning, match=r"norm.running_mean.*states\[0\].*reestimate=True"):
        landscape.plane(make_net(), cross_entropy, DATA, states, points=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        landscape.plane(make_net(), cross_entropy, DATA, states, points=2, reestimate=DATA)


@pytest.mark.parametrize("columns", [1 << 18, 7], ids=["whole", "parts"])
def test_trajectory_on_a_known_plane(columns, monkeypatch):
    monkeypatch.setattr("samkern.landscape.directions.COLUMNS", columns)
    net = make_net()
    own = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    u, v = ([torch.randn_like(w) for w in own] for _ in range(2))
    places = torch.tensor([[-5.0, 1.0], [-3.0, 2.0], [-1.0, -0.5], [0.0, 0.0]]).double().tolist()
    states = [[w + s * x + t * y for w, x, y in zip(own, u, v, strict=True)] for s, t in places]
    found = landscape.trajectory(net, cross_entropy, DATA, states, points=3)
    rows = np.stack([torch.cat([x.flatten() for x in s]).numpy() for s in states])
    path, shares = oracle.principal_plane(rows)
    assert np.allclose(found.path, path, atol=1e-8)
    assert shares.sum() == pytest.approx(1)
    assert [f"{100 * s:.3g} %" in label for s, label in zip(shares, found.labels, strict=True)] == [True, True]
    # The plane holds all of them, so that the losses are theirs.
    lists = [landscape.interpolate(net, cross_entropy, DATA, s, s, points=2).loss[0] for s in states]
    assert np.allclose(found.path_loss, lists, rtol=1e-8)


# ---- nothing is left behind


def test_everything_is_as_it_was():
    net, states = make_net(), [state(k) for k in range(3)]
    net.conv2.eval()
    before = [x.clone().double() for x in net.state_dict().values()]
    kept, rng = copy.deepcopy(states), torch.get_rng_state()
    landscape.surface(net, cross_entropy, DATA, points=3)
    landscape.interpolate(net, cross_entropy, DATA, states[0], states[1], points=3, reestimate=True)
    landscape.plane(net, cross_entropy, DATA, states, points=2)
    assert same_bits([x.double() for x in net.state_dict().values()], before)
    assert all(
        torch.equal(x, y)
        for s, k in zip(states, kept, strict=True)
        for x, y in zip(s.values(), k.values(), strict=True)
    )
    assert (net.training, net.norm.training, net.conv2.training) == (True, True, False)
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


class Counting(nn.Module):
    """Keeps a running mean even in evaluation mode, and answers by it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return (x * self.w).sum() * self.calls


def test_no_point_starts_from_the_one_before():
    net = Counting()
    found = landscape.line(
        net, lambda out, _: out, [(torch.ones(2), None)], direction=[torch.zeros(1, 2) + 1e-9], points=9
    )
    assert np.allclose(found.loss, 2.0)
    assert net.calls == 0
    # Nor are buffers of a checkpoint written.
    states = [{"w": k * torch.ones(1, 2), "calls": torch.zeros(())} for k in (1, 3)]
    data = [(torch.ones(2), None)]
    for parallel in (1, 3):
        found = landscape.interpolate(net, lambda out, _: out, data, *states, points=3, parallel=parallel)
        assert found.loss.tolist() == [2.0, 4.0, 6.0]
        assert all(s["calls"] == 0 for s in states)


# ---- several at once


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(torch.tanh(self.dropout(self.embedding(x))))


def test_at_once_is_one_by_one():
    net, states = make_net(), trained_states()
    kinds = [
        lambda k: landscape.surface(net, cross_entropy, DATA, points=3, parallel=k),
        lambda k: landscape.interpolate(net, cross_entropy, DATA, states[0], states[4], points=5, parallel=k),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no falling back
        for kind in kinds:
            alone, at_once = kind(1), kind(4)
            assert np.allclose(alone.loss, at_once.loss, rtol=1e-10)
            assert np.array_equal(alone.accuracy, at_once.accuracy)


@pytest.mark.parametrize("parallel", [1, 3])
def test_tied_weights(parallel):
    net, data = Tied(), [(torch.arange(7), torch.arange(7))]
    found = landscape.line(net, cross_entropy, data, points=3, parallel=parallel)
    assert found.loss[1] == pytest.approx(direct_loss(net, data))
    one_name = {"embedding.weight": net.embedding.weight.detach() * 2}  # as some files keep it
    between = landscape.interpolate(net, cross_entropy, data, net.state_dict(), one_name, points=3, parallel=parallel)
    whole = {"embedding.weight": one_name["embedding.weight"], "head.weight": one_name["embedding.weight"]}
    assert between.loss[-1] == pytest.approx(direct_loss(net, data, whole), rel=1e-6)


class Reading(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1.0 if self.weight.sum().item() > 0 else 2.0)


def test_what_vmap_cannot_take():
    net, data = Reading(4, 5), [(torch.randn(6, 4), torch.arange(6) % 5)]
    with pytest.warns(UserWarning, match="one by one, torch.func.vmap cannot take") as caught:
        found = landscape.line(net, cross_entropy, data, points=5, parallel=5)
    assert len(caught) == 1
    assert np.array_equal(found.loss, landscape.line(net, cross_entropy, data, points=5).loss)
    with pytest.warns(UserWarning, match="reestimate= runs BatchNorm"):
        landscape.interpolate(net, cross_entropy, data, net.state_dict(), net.state_dict(), reestimate=True, parallel=2)


def test_wrapped_models():
    net, wrapped = make_net(), nn.DataParallel(make_net())
    for s in (wrapped.state_dict(), net.state_dict()):
        found = landscape.interpolate(wrapped, cross_entropy, DATA, s, s, points=2)
        assert found.loss[0] == pytest.approx(direct_loss(net), rel=1e-14)


# ---- files


class Interrupted:
    """A loss that an interrupt ends after so many calls."""

    def __init__(self, after=10**9):
        self.calls, self.after = 0, after

    def __call__(self, out, y):
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        return cross_entropy(out, y)


@pytest.mark.parametrize("parallel", [1, 4])
def test_resumed_after_an_interrupt(tmp_path, parallel):
    net, path, calls_a_point = make_net(), tmp_path / "deep" / "surface.npz", 2
    options = {"points": 3, "parallel": parallel, "file": path}
    whole = landscape.surface(net, Interrupted(), DATA, **{**options, "file": None})
    probe = 1  # batch, by which a changed model or loss is found out
    first = Interrupted(after=probe + calls_a_point * (4 if parallel == 1 else 1) + 1)
    with pytest.raises(KeyboardInterrupt):
        landscape.surface(net, first, DATA, **options)
    part = Landscape.load(path)
    assert np.isfinite(part.loss).sum() == 4
    second = Interrupted()
    found = landscape.surface(net, second, DATA, **options)
    assert second.calls == probe + calls_a_point * (5 if parallel == 1 else 2)
    assert np.array_equal(found.loss, whole.loss)
    assert np.array_equal(found.accuracy, whole.accuracy)
    third = Interrupted()
    assert np.array_equal(landscape.surface(net, third, DATA, **options).loss, whole.loss)
    assert third.calls == probe
    assert np.array_equal(Landscape.load(path).loss, whole.loss)
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_nan_is_not_computed_again(tmp_path):
    calls = []

    def loss(out, _):
        calls.append(1)
        return out * torch.nan

    for _ in range(2):
        found = landscape.line(Plane(), loss, ON_PLANE["data"], direction=AXES[0], points=3, file=tmp_path / "x.npz")
        assert np.isnan(found.loss).all()
    assert len(calls) == 3 + 2  # twice a batch to see that it is the same landscape


def test_a_file_of_something_else(tmp_path):
    net, path = make_net(), tmp_path / "line.npz"
    landscape.line(net, cross_entropy, DATA, points=3, file=path)
    content = path.read_bytes()
    other = make_net()
    with torch.no_grad():
        other.norm.running_mean[0] += 1e-9
    for make in (
        lambda: landscape.line(other, cross_entropy, DATA, points=3, file=path),
        lambda: landscape.line(net, cross_entropy, DATA[:1], points=3, file=path),
        lambda: landscape.line(net, cross_entropy, DATA, points=5, file=path),
        lambda: landscape.line(net, cross_entropy, DATA, points=3, seed=1, file=path),
        lambda: landscape.line(net, nn.functional.nll_loss, DATA, points=3, file=path),
    ):
        with pytest.raises(ValueError, match="is of another landscape"):
            make()
    assert path.read_bytes() == content
    path.write_bytes(b"no npz")
    with pytest.raises(ValueError, match="is no landscape that can be read"):
        landscape.line(net, cross_entropy, DATA, points=3, file=path)
    assert path.read_bytes() == b"no npz"


def test_a_file_of_another_loss_or_model(tmp_path):
    """Of the same name, on the same weights."""
    x, y = torch.randn(10, 4, generator=seeded(0)), torch.arange(10) % 3
    relu = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    tanh = nn.Sequential(relu[0], nn.Tanh(), relu[2])
    smooth = [functools.partial(cross_entropy, label_smoothing=s) for s in (0.0, 0.1)]
    looks = [(relu, smooth[0]), (relu, smooth[1]), (tanh, smooth[0])]
    path = tmp_path / "line.npz"
    landscape.line(*looks[0], [(x, y)], points=3, file=path)
    for model, loss in looks[1:]:
        with pytest.raises(ValueError, match="the model or the loss computes something else"):
            landscape.line(model, loss, [(x, y)], points=3, file=path)


def test_a_file_of_other_targets(tmp_path):
    """Which are no tensors: the repr of an array leaves out its middle."""
    net, x = nn.Linear(4, 3), torch.randn(2000, 4)
    path, options = tmp_path / "line.npz", {"points": 3, "file": tmp_path / "line.npz"}
    first, second = np.zeros(2000, dtype=np.int64), np.zeros(2000, dtype=np.int64)
    second[500] = 1
    loss = lambda out, y: cross_entropy(out, torch.from_numpy(y))  # noqa: E731
    landscape.line(net, loss, [(x, first)], **options)
    with pytest.raises(ValueError, match="is of another landscape"):
        landscape.line(net, loss, [(x, second)], **options)
    assert path.exists()


def test_own_weights_do_not_count_where_checkpoints_have_all(tmp_path):
    calls = []

    def loss(out, y):
        calls.append(1)
        return cross_entropy(out, y)

    for seed in (3, 4):  # as in a script that makes its model anew
        landscape.interpolate(make_net(seed=seed), loss, DATA, state(0), state(1), points=3, file=tmp_path / "x.npz")
    assert len(calls) == (1 + 3 * len(DATA)) + 1
    with pytest.raises(ValueError, match="is of another landscape"):
        landscape.interpolate(make_net(), loss, DATA, state(0), state(2), points=3, file=tmp_path / "x.npz")


def test_nothing_is_hashed_without_a_file(monkeypatch):
    monkeypatch.setattr("samkern.landscape.sweep.identity_of", lambda *_: pytest.fail("hashed"))
    monkeypatch.setattr("samkern.landscape.around.identity_of", lambda *_: pytest.fail("hashed"))
    landscape.line(make_net(), cross_entropy, DATA, points=3)


def test_a_file_that_cannot_be_written(tmp_path):
    def loss(out, y):
        pytest.fail("computed what cannot be kept")

    (tmp_path / "taken").write_text("no folder")
    for path in (tmp_path / "taken" / "x.npz", "/proc/x.npz"):
        with pytest.raises(OSError, match=r"x.npz' cannot be written .*: give a name in another folder"):
            landscape.line(make_net(), loss, DATA, points=3, file=path)


def test_two_processes_and_one_file(tmp_path, monkeypatch):
    """The second begins and ends while the first computes; what it has found is not lost, nor computed again."""
    net, path = make_net(), tmp_path / "line.npz"
    same_net = copy.deepcopy(net)
    monkeypatch.setattr("samkern.landscape.sweep.SAVE_EVERY", 0.0)
    options = {"points": 5, "file": path}
    calls = []

    def loss(out, y):
        calls.append(1)
        if len(calls) == 2:
            landscape.line(same_net, cross_entropy, DATA, points=5, file=path)
        return cross_entropy(out, y)

    loss.__qualname__ = cross_entropy.__qualname__
    found = landscape.line(net, loss, DATA, **options)
    assert len(calls) == 1 + len(DATA)
    assert np.array_equal(found.loss, landscape.line(net, cross_entropy, DATA, points=5).loss)
    assert [p.name for p in tmp_path.iterdir()] == ["line.npz"]


def test_writers_do_not_meet(tmp_path):
    path = tmp_path / "x.npz"
    with landscape.result.replacing(path) as first, landscape.result.replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), landscape.result.replacing(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    assert path.read_text() == "first"


def test_damaged_files(tmp_path):
    path = bowl().save(tmp_path / "x.npz")
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    contents = [whole[: len(whole) // 2], b"", b"text", whole[:300] + b"\xff" * 20 + whole[320:]]
    for content in (*contents, (tmp_path / "array.npy").read_bytes(), (tmp_path / "other.npz").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path=.* is no landscape that can be read"):
            Landscape.load(path)
        with pytest.raises(ValueError, match=r"file=.* is no landscape that can be read"):
            landscape.line(make_net(), cross_entropy, DATA, points=3, file=path)
        assert path.read_bytes() == content


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 4}, "points must be odd"),
        ({"points": 1}, "points must be odd"),
        ({"span": float("nan")}, "span must be a number > 0, got nan"),
        ({"span": -1}, "span must be a number > 0"),
        ({"parallel": 0}, "parallel must be an integer >= 1"),
        ({"accuracy": 2}, "accuracy must be"),
        ({"normalise": False}, "normalise=False is for directions that you give"),
        ({"direction": [torch.zeros(1)]}, "direction has 1 tensors, the model 8"),
        ({"direction": [torch.zeros(1)] * 8}, r"direction: unused has shape \(1,\), the model's \(3, 3\)"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        landscape.line(make_net(), cross_entropy, DATA, **{"points": 3, **options})


def test_wrong_directions():
    zeros = [torch.zeros_like(p) for p in make_net().parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="direction is zero"):
        landscape.line(make_net(), cross_entropy, DATA, direction=zeros)
    with pytest.raises(ValueError, match="NaN or infinite"):
        landscape.line(make_net(), cross_entropy, DATA, direction=[x + torch.nan for x in zeros])
    with pytest.raises(ValueError, match="no filters to normalise"):
        landscape.line(Plane(), **ON_PLANE)
    with pytest.raises(ValueError, match="accuracy=True needs logits"):
        landscape.line(Plane(), **ON_PLANE, direction=AXES[0], accuracy=True)
    with pytest.raises(ValueError, match="make those you give orthogonal"):
        landscape.surface(Plane(), **ON_PLANE, directions=AXES, orthogonal=True)


def test_directions_that_lead_nowhere():
    net = nn.Linear(4, 5)
    data = [(torch.randn(6, 4), torch.arange(6) % 5)]
    only_bias = [torch.zeros(5, 4), torch.ones(5)]
    with pytest.raises(ValueError, match="zero once it is normalised"):
        landscape.line(net, cross_entropy, data, points=3, direction=only_bias, normalise=True)
    nn.init.zeros_(net.weight[0:1])
    [(weight, _)] = landscape.random_directions(net)
    assert not weight[0].any()
    assert weight.isfinite().all()
    nn.init.zeros_(net.weight)
    with pytest.raises(ValueError, match="zero once it is normalised"):
        landscape.surface(net, cross_entropy, data, points=3)


def test_wrong_checkpoints():
    net, good = make_net(), state(0)
    interpolate = lambda b: landscape.interpolate(net, cross_entropy, DATA, good, b)  # noqa: E731
    with pytest.raises(ValueError, match="b has more, which the model has not"):
        interpolate({**good, "more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"b lacks head.bias"):
        interpolate({k: x for k, x in good.items() if k != "head.bias"})
    with pytest.raises(ValueError, match=r"b: head.bias has shape \(2,\), the model's \(5,\)"):
        interpolate({**good, "head.bias": torch.zeros(2)})
    with pytest.raises(TypeError, match="b must be a list of tensors or a state_dict, got str"):
        interpolate("checkpoint.pt")
    with pytest.raises(ValueError, match="states must be three checkpoints, got 2"):
        landscape.plane(net, cross_entropy, DATA, [good, good])
    with pytest.raises(ValueError, match=r"states\[0\] and states\[1\] are equal"):
        landscape.plane(net, cross_entropy, DATA, [good, good, state(1)])
    third = {k: 2 * state(1)[k] - x if x.is_floating_point() else x for k, x in good.items()}
    for make in (landscape.plane, landscape.trajectory):
        with pytest.raises(ValueError, match="on a line and span no plane"):
            make(net, cross_entropy, DATA, [good, state(1), third])
    with pytest.raises(ValueError, match="margin must be a number >= 0, got nan"):
        landscape.plane(net, cross_entropy, DATA, [good, state(1), state(2)], margin=float("nan"))
    with pytest.raises(ValueError, match="only an interpolation"):
        _ = landscape.line(Plane(), **ON_PLANE, direction=AXES[0], points=3).barrier


# ---- figures


def bowl(kind="surface", **options):
    a, b = np.linspace(-1, 1, 9), np.linspace(-2, 2, 11)
    loss = 0.1 + np.add.outer(a**2, 3 * b**2)
    return Landscape(kind, "bowl", a, b, loss=loss, accuracy=100 - loss, labels=("along a", "along b"), **options)


def texts(chart):
    return [t for t in chart.findobj(match=lambda artist: hasattr(artist, "get_fontsize")) if t.get_text().strip()]


def test_contours_have_labelled_levels():
    chart = bowl().figure()
    levels, logarithmic = landscape.figures.levels_of(bowl().loss)
    assert logarithmic  # 13.1 to 0.1
    [axes] = chart.axes
    lines = next(c for c in axes.collections if len(c.get_paths()) == len(levels) and not c.get_fill())
    assert np.allclose(10**lines.levels, levels)
    shown = {t.get_text() for t in axes.texts}
    assert shown <= set(map(landscape.figures.short, levels))
    assert len(shown) >= len(levels) // 2
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("along a", "along b")
    # The lines of 3 b^2 are closer along b: the grid is not transposed.
    ring = lines.get_paths()[levels.index(1.0)].vertices
    assert np.ptp(ring[:, 0]) == pytest.approx(2 * 0.9**0.5, rel=0.1)
    assert np.ptp(ring[:, 1]) == pytest.approx(2 * 0.3**0.5, rel=0.1)
    chart.draw_without_rendering()
    assert min(t.get_fontsize() for t in texts(chart)) >= 8


def test_linear_levels():
    values = np.linspace(1.0, 2.0, 30)
    levels, logarithmic = landscape.figures.levels_of(values)
    assert not logarithmic
    assert 5 <= len(levels) <= 12
    assert 1 <= min(levels) < max(levels) <= 2
    assert landscape.figures.levels_of(np.array([np.nan, np.inf])) == ([], False)


@pytest.mark.parametrize("kind", ["plane", "trajectory"])
def test_paths_are_drawn(kind):
    path = np.array([[-0.8, 0.5], [0.3, 0.4], [0.0, 0.0]])
    x = bowl(kind, path=path, path_loss=np.array([1.0, 0.7, 0.1]), path_accuracy=np.array([99.0, 99.3, 99.9]))
    [axes] = x.figure().axes
    drawn = next(line for line in axes.lines if line.get_label() == "checkpoints")
    assert np.array_equal(drawn.get_xydata(), path)
    words = {t.get_text() for t in axes.texts}
    assert words >= (set("ABC") if kind == "plane" else {"first", "last"})
    [axes] = x.figure("surface").axes
    assert axes.name == "3d"
    assert [line for line in axes.lines if line.get_label() == "checkpoints"]


def test_curves_are_compared():
    a = np.linspace(0, 1, 11)
    both = [
        Landscape("line", t, a, loss=1 + k * a**2, accuracy=50 + a, labels=("x", ""))
        for k, t in ((1, "SGD"), (2, "SAM"))
    ]
    chart = landscape.figure(both)
    left, right = chart.axes
    assert [line.get_label() for line in left.lines] == ["SGD", "SAM"]
    assert np.array_equal(left.lines[1].get_ydata(), both[1].loss)
    assert np.array_equal(right.lines[0].get_ydata(), both[0].accuracy)
    assert len({line.get_marker() for line in left.lines}) == 2  # grey print
    assert [t.get_text() for t in chart.legends[0].get_texts()] == ["SGD", "SAM"]
    assert "loss" in left.get_ylabel()
    assert "%" in right.get_ylabel()


def cut_off(chart):
    """The names that reach out of the figure."""
    chart.draw_without_rendering()
    whole, shown = chart.bbox.padded(1), [t for legend in chart.legends for t in legend.get_texts()]
    for axes in chart.axes:
        shown += [axes.title, axes.xaxis.label, axes.yaxis.label, *([axes.zaxis.label] if axes.name == "3d" else [])]
    boxes = {t.get_text(): t.get_window_extent() for t in shown if t.get_text()}
    inside = lambda box: whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1  # noqa: E731
    return [name for name, box in boxes.items() if not inside(box)]


@pytest.mark.parametrize("title", ["method {}", "a rather long name of method number {} with a radius of 0.05"])
def test_many_curves_are_told_apart(title):
    a = np.linspace(-1, 1, 11)
    many = [Landscape("line", title.format(k), a, loss=1 + k * a**2, labels=("x", "")) for k in range(12)]
    chart = landscape.figure(many)
    assert len({(line.get_color(), line.get_marker()) for line in chart.axes[0].lines}) == 12
    assert cut_off(chart) == []
    assert chart.legends[0].get_window_extent().x0 >= 0
    assert chart.axes[0].get_window_extent().height > 150  # of 360 dots


@pytest.mark.parametrize("view", ["contour", "surface"])
def test_close_losses_have_other_labels(view):
    near = dataclasses.replace(bowl(), loss=2.3026 + 1e-6 * bowl().loss, title="a long title of a run, " * 4)
    chart = near.figure(view)
    assert cut_off(chart) == []
    ticks = [t.get_text() for t in chart.axes[0].get_zticklabels()] if view == "surface" else None
    shown = ticks or [t.get_text() for t in chart.axes[0].texts]
    assert len(set(shown)) >= 3
    levels, _ = landscape.figures.levels_of(near.loss)
    for name in shown:
        assert min(abs(float(name) - level) for level in levels) < 1e-8


def test_a_constant_loss_is_said():
    flat = dataclasses.replace(bowl(), loss=np.full_like(bowl().loss, 2.3))
    assert [t.get_text() for t in flat.figure().axes[0].texts] == ["the loss is 2.3 wherever it is computed"]


def test_parts_are_drawn_too():
    loss = bowl().loss
    loss[4:] = np.nan
    part = dataclasses.replace(bowl(), loss=loss)
    for view in ("contour", "surface"):
        part.figure(view).draw_without_rendering()
    nothing = dataclasses.replace(part, loss=np.full_like(loss, np.nan))
    assert [t.get_text() for t in nothing.figure().axes[0].texts] == ["nothing to draw yet"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing.figure("surface").draw_without_rendering()


def test_wrong_figures():
    with pytest.raises(ValueError, match="view must be 'contour', 'surface' or None, got 'wire'"):
        bowl().figure("wire")
    with pytest.raises(ValueError, match="draw surfaces one by one"):
        landscape.figure([bowl(), bowl()])
    with pytest.raises(ValueError, match="have been computed"):
        landscape.figure([])


# ---- pages


def test_a_page_needs_nothing_but_itself(tmp_path):
    text = bowl().html(tmp_path / "bowl.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", text)
    assert "<title>bowl</title>" in text
    for nothing in (bowl(), Landscape("line", "", bowl().a, loss=bowl().a)):
        dataclasses.replace(nothing, loss=np.full_like(nothing.loss, np.nan)).html(tmp_path / "nothing.html")
    chart = landscape.plotly_figure(bowl())
    assert np.array_equal(chart.data[0].z, bowl().loss.T)
    assert chart.data[0].text[3][1] == "a -0.75, b -0.8<br>loss 2.582<br>accuracy 97.42 %"


@pytest.mark.takes(8)
def test_a_page_in_a_browser(tmp_path, page):
    path = np.array([[-0.8, 0.5], [0.3, 0.4], [0.0, 0.0]])
    x = bowl("trajectory", path=path, path_loss=np.array([1.0, 0.7, 0.1]))
    page.goto(x.html(tmp_path / "bowl.html").as_uri())
    page.wait_for_selector(".gl-container canvas, canvas")
    assert not page.locator(".contourlayer path, .contour path").count()
    page.get_by_text("contours", exact=True).click()
    page.wait_for_selector(".contourlayer path, .contour path", state="attached")
    box = page.locator(".nsewdrag").first.bounding_box()
    for share in (0.30, 0.31):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.3 * box["height"])
    page.wait_for_selector(".hoverlayer .hovertext")
    shown = page.locator(".hoverlayer .hovertext").first.text_content()
    assert re.search(r"loss [\d.]+accuracy [\d.]+ %", shown)
    page.get_by_text("surface", exact=True).click()
    page.wait_for_selector(".contourlayer path, .contour path", state="detached")
    page.set_viewport_size({"width": 375, "height": 667})
    page.reload()
    # Far enough that a phone shows its sides.
    page.wait_for_function("document.querySelector('.js-plotly-plot')?._fullLayout?.scene?.camera?.eye?.x > 2")
