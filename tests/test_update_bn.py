"""BatchNorm estimated anew: torch's ``update_bn`` where that is right, all else of the model left alone, all ranks together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn as update_bn_of_torch

import samkern

from .lists import same_bits, seeded
from .problems import batch, make_net, train


def batches(n=5, sizes=(8,)):
    return [torch.randn(sizes[i % len(sizes)], 4, generator=seeded(i)) + 1 for i in range(n)]


def make_model(momentum=0.1, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=momentum), nn.Dropout(dropout), nn.ReLU(), nn.BatchNorm1d(3)]
    return nn.Sequential(*layers, nn.Linear(3, 2))


def buffers(model):
    return [b.clone().double() for b in model.buffers()]


def modes(model):
    return [(m.training, getattr(m, "momentum", 0)) for m in model.modules()]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_equals_torchs_without_dropout(momentum, training):
    """Bit by bit; batches of different sizes count equally."""
    model = make_model(momentum).train(training)
    model[1].train(not training)
    model(batches(1)[0])
    twin, before = copy.deepcopy(model), modes(model)
    loader = batches(5, sizes=(8, 3))
    samkern.update_bn(model, loader)
    update_bn_of_torch(loader, twin)
    assert same_bits(buffers(model), buffers(twin))
    assert modes(model) == before
    assert model[1].num_batches_tracked == 5


def test_equals_the_mean_over_batches():
    model, loader = make_model(), batches()
    samkern.update_bn(model, loader)
    first = [model[0](x) for x in loader]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(0) for x in first]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var(0) for x in first]).mean(0))


def test_dropout_is_off():
    """As it will be in evaluation. And no random number is drawn."""
    model, plain = make_model(dropout=0.9), make_model()
    state = torch.get_rng_state()
    samkern.update_bn(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    samkern.update_bn(plain, batches())
    assert same_bits(buffers(model), buffers(plain))


class OwnTrain(nn.Module):
    """Does more than set a flag when its mode changes, as adapters that merge their weights do."""

    def __init__(self):
        super().__init__()
        self.norm, self.changes = nn.BatchNorm1d(4), 0

    def train(self, mode=True):
        self.changes += 1
        return super().train(mode)

    def forward(self, x):
        return self.norm(x)


def test_nothing_else_of_the_model_changes():
    model = nn.Sequential(
        OwnTrain(), nn.InstanceNorm1d(4, track_running_stats=True), nn.BatchNorm1d(4, track_running_stats=False)
    )
    changes = model[0].changes
    instance = [x.clone() for x in model[1].buffers()]
    samkern.update_bn(model, [x[..., None].expand(-1, -1, 6) + torch.randn(6) for x in batches()])
    assert model[0].changes == changes
    assert all(torch.equal(a, b) for a, b in zip(model[1].buffers(), instance, strict=True))
    assert model[0].norm.num_batches_tracked == 5
    assert all(p.grad is None for p in model.parameters())


class Unread:
    def __iter__(self):
        raise AssertionError("the loader was read")


def test_without_batchnorm_nothing_is_done():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    samkern.update_bn(model, Unread())
    assert all(m.training for m in model.modules())


class WithKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, x, scale=1.0):
        return self.inner(scale * x)


def test_what_loaders_yield():
    """Tensors, tuples and lists that begin with the input, dicts of keywords; moved to a device if one is given."""
    expected = WithKeywords()
    samkern.update_bn(expected, [2 * x for x in batches()])
    for loader, model in [
        ([(2 * x, "label") for x in batches()], WithKeywords()),
        ([[2 * x] for x in batches()], WithKeywords()),
        ([{"x": x, "scale": 2.0} for x in batches()], WithKeywords()),
        (iter([2 * x for x in batches()]), WithKeywords()),
    ]:
        samkern.update_bn(model, loader, device="cpu")
        assert same_bits(buffers(model), buffers(expected))
    model = WithKeywords().to("meta")
    for loader in ([(x, x) for x in batches()], [{"x": x} for x in batches()]):
        with pytest.raises(RuntimeError, match="on meta tensors"):  # BatchNorm has got one, and asks for a number
            samkern.update_bn(model, loader, device="meta")


def test_progress():
    seen = []
    samkern.update_bn(make_model(), batches(3), progress=lambda *args: seen.append(args))
    samkern.update_bn(make_model(), iter(batches(2)), progress=lambda *args: seen.append(args))
    assert seen == [(1, 3), (2, 3), (3, 3), (1, None), (2, None)]


@pytest.mark.parametrize("failure", ["loader", "model", "progress", "empty"])
def test_if_it_fails_statistics_are_what_they_were(failure):
    model = make_model()
    model(batches(1)[0])
    model[1].eval()
    before = buffers(model), modes(model)

    def progress(done, _):
        if failure == "progress" and done == 2:
            raise KeyboardInterrupt

    loader = {"empty": [], "model": [*batches(2), torch.zeros(3, 7)]}.get(failure, batches())
    if failure == "loader":
        loader = (x if i < 2 else 1 / 0 for i, x in enumerate(batches()))
    error = {"loader": ZeroDivisionError, "progress": KeyboardInterrupt, "empty": ValueError, "model": RuntimeError}
    with pytest.raises(error[failure], match="the loader has no batch" if failure == "empty" else None):
        samkern.update_bn(model, loader, progress=progress)
    assert same_bits(buffers(model), before[0])
    assert modes(model) == before[1]


def test_of_an_average_that_is_swapped_in():
    """What an average needs for evaluation; the training goes on with its own statistics."""
    net = make_net(torch.float32)
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=0.1, model=net)
    ema = samkern.EMA(opt, 0.8)
    train(net, opt, range(4), torch.float32)
    loader = [batch(t, torch.float32) for t in range(4)]
    before = buffers(net)
    with ema.swapped(net):
        samkern.update_bn(net, loader)
        within = buffers(net)
    assert same_bits(buffers(net), before)
    twin = make_net(torch.float32)
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        for p, average in zip(twin.parameters(), ema.averages, strict=True):
            p.copy_(average)
    update_bn_of_torch(loader, twin)
    assert same_bits(buffers(twin), within)
    assert not same_bits(within, before)


# ---- several processes


class OneTwice(nn.Module):
    """The second norm runs once more for large batches, so that counts differ."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.b(self.a(x))
        return self.b(x) if len(x) > 3 else x


def estimate(rank_batches, ddp):
    """On one rank. Returns its statistics."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), OneTwice())
    samkern.update_bn(DistributedDataParallel(model) if ddp else model, rank_batches[rank])
    return buffers(model)


@pytest.mark.parametrize("ddp", [True, False])
@pytest.mark.parametrize("numbers", [(3, 3), (4, 1), (0, 2)], ids=str)
def test_ranks_estimate_together(ranks, ddp, numbers):
    """As one process on all batches, if they have different numbers of them, too."""
    all_batches = batches(sum(numbers), sizes=(8, 3))
    parts = [all_batches[: numbers[0]], all_batches[numbers[0] :]]
    first, second = ranks.run(2, estimate, parts, ddp)
    assert same_bits(first, second)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), OneTwice())
    samkern.update_bn(model, all_batches)
    for ours, theirs in zip(first, buffers(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def estimate_from_nothing():
    try:
        samkern.update_bn(make_model(), [])
    except ValueError as error:
        return str(error)
    return None


def test_ranks_without_any_batch(ranks):
    assert all("no batch" in message for message in ranks.run(2, estimate_from_nothing))
