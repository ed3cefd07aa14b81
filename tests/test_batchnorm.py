"""Running statistics: moved by the first pass, untouched by the second."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import samkern

from .lists import same_bits, seeded


class OwnForward(nn.BatchNorm1d):
    """A subclass that updates its statistics by itself, whatever the flag says."""

    def forward(self, x):
        self.running_mean.lerp_(x.mean(0), 0.5)
        self.num_batches_tracked += 1
        return x - x.mean(0)


class Foreign(nn.Module):
    """A norm of another package: no BatchNorm by type, but it owns running statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        self.running_var.mul_(0.9).add_(x.var(0), alpha=0.1)
        return x / self.running_var.detach().clone().sqrt()


class Renamed(nn.BatchNorm1d):
    """A subclass that keeps torch's forward."""


NORMS = {
    "momentum": lambda: nn.BatchNorm1d(3),
    "cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "no_statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "subclass": lambda: Renamed(3),
    "own_forward": lambda: OwnForward(3),
    "foreign": Foreign,
    "evaluation": lambda: nn.BatchNorm1d(3).eval(),
    "lazy": nn.LazyBatchNorm1d,
    "instance": None,  # needs a model of its own, see make_model
}
INSTANCE_LENGTH = 5


def make_model(norm):
    torch.manual_seed(1)
    if norm == "instance":
        return nn.Sequential(
            nn.Linear(4, 3 * INSTANCE_LENGTH),
            nn.Unflatten(1, (3, INSTANCE_LENGTH)),
            nn.InstanceNorm1d(3, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(3 * INSTANCE_LENGTH, 2),
        )
    model = nn.Sequential(nn.Linear(4, 3), NORMS[norm](), nn.Linear(3, 2))
    model(torch.randn(8, 4)) if norm == "lazy" else None
    return model


def buffers(model):
    return [b.clone().double() for b in model.buffers()]


def run(model, opt, x):
    def closure():
        opt.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    opt.step(closure)


@pytest.mark.parametrize("norm", NORMS)
def test_buffers_after_a_sam_step_are_those_after_an_sgd_step(norm, backend):
    model = make_model(norm)
    twin = copy.deepcopy(model)
    opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=1.0, model=model, backend=backend)
    plain = torch.optim.SGD(twin.parameters(), lr=0.0)
    unfrozen = copy.deepcopy(model)
    free = samkern.SAM(unfrozen.parameters(), torch.optim.SGD, lr=0.0, rho=1.0, backend=backend)
    for t in range(3):
        x = torch.randn(8, 4, generator=seeded(t))
        run(model, opt, x)
        run(twin, plain, x)
        run(unfrozen, free, x)
    assert same_bits(buffers(model), buffers(twin))
    if norm not in ("no_statistics", "evaluation"):
        assert not same_bits(buffers(unfrozen), buffers(twin))  # without freezing they do differ


@pytest.mark.parametrize("norm", NORMS)
def test_the_frozen_pass_computes_the_same(norm):
    """Freezing must not change what the second pass sees."""
    model = make_model(norm)
    twin = copy.deepcopy(model)
    x = torch.randn(8, 4)
    with samkern.frozen_running_stats(model):
        frozen = model(x)
    assert torch.equal(frozen, twin(x))


@pytest.mark.parametrize("norm", NORMS)
def test_flags_and_buffers_come_back_after_an_exception(norm):
    model = make_model(norm)
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    before = buffers(model)
    with pytest.raises(KeyboardInterrupt), samkern.frozen_running_stats(model):
        model(torch.randn(8, 4))
        raise KeyboardInterrupt
    assert [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()] == modes
    assert same_bits(buffers(model), before)


def test_nested_freezing():
    model = make_model("momentum")
    with samkern.frozen_running_stats(model), samkern.frozen_running_stats(model):
        pass
    assert model[1].track_running_stats


def test_sync_batchnorm_is_covered():
    """Its forward needs process groups; what is frozen is seen without one."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model("momentum"))
    with samkern.frozen_running_stats(model):
        assert not model[1].track_running_stats
    assert model[1].track_running_stats


def test_two_halves_without_a_closure_freeze_too(backend):
    model = make_model("momentum")
    opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, backend=backend)
    model(torch.randn(8, 4)).sum().backward()
    after_first = buffers(model)
    opt.first_step()
    model(torch.randn(8, 4)).sum().backward()
    assert same_bits(buffers(model), after_first)
    opt.second_step()
    assert model[1].track_running_stats
