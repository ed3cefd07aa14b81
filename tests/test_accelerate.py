"""Accelerate's loop takes the steps of a loop written out: bitwise, whatever it accumulates, clips, scales or resumes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import samkern

from .recipes import run_all_about

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install samkern[accelerate]")

from samkern.integrations.accelerate import Passes  # noqa: E402

BASE = {"lr": 0.01, "momentum": 0.9}
METHODS = {
    "SAM": lambda p, **o: samkern.SAM(p, SGD, rho=0.1, **BASE, **o),
    "LookSAM": lambda p, **o: samkern.LookSAM(p, SGD, rho=0.1, k=3, **BASE, **o),
    "SSAMD": lambda p, **o: samkern.SSAMD(p, SGD, rho=0.1, total_steps=20, refresh_interval=2, **BASE, **o),
    "MSAM": lambda p, **o: samkern.MSAM(p, SGD, rho=0.1, **BASE, **o),
}
DATA = [
    (torch.randn(6, 5, generator=torch.Generator().manual_seed(i)), torch.tensor([0, 1, 2, 0, 1, 2])) for i in range(7)
]


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(net, batch):
    return 16 * nn.functional.cross_entropy(net(batch[0]), batch[1])


class Run:
    """A training with Accelerate."""

    def __init__(self, method="SAM", accumulate=1, scaler=None, precision="no", clip=None, **options):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        self.accelerator.scaler = scaler  # Accelerate gives none to a CPU
        net = make_net()
        self.opt = METHODS[method](net.parameters(), model=net, **options)
        rates = torch.optim.lr_scheduler.LinearLR(self.opt, 1.0, 0.1, 10)
        loader = torch.utils.data.DataLoader(DATA, batch_size=None)
        prepared = self.accelerator.prepare(net, self.opt, rates, loader)
        self.net, self.optimizer, self.rates, self.loader = prepared
        self.passes = Passes(self.accelerator, self.net, self.optimizer, lambda batch: loss_of(self.net, batch))
        self.clip, self.losses = clip, []

    def epoch(self):
        for batch in self.loader:
            with self.accelerator.accumulate(self.net):
                self.losses.append(self.passes(batch).item())
                if self.clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.net.parameters(), self.clip)
                self.optimizer.step()
                self.rates.step()
                self.optimizer.zero_grad()
        return self


def written_out(method="SAM", accumulate=1, scaler=None, dtype=None, epochs=1, **options):
    """The same without Accelerate."""
    net = make_net()
    opt = METHODS[method](net.parameters(), model=net, **options)
    rates = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 10)

    def sweep(batches):
        for batch in batches:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = loss_of(net, batch)
            loss = loss / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()

    for start in list(range(0, len(DATA), accumulate)) * epochs:
        batches = DATA[start : start + accumulate]
        if opt.perturbation.before_pass:
            with opt.perturbed():
                sweep(batches)
            opt.step()
        else:
            sweep(batches)
            if opt.first_step(scaler=scaler):
                sweep(batches)
            opt.second_step()
        if scaler is not None:
            scaler.update()
        rates.step()
        opt.zero_grad()
    return net, opt


def same(net, other):
    return all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_training(method, accumulate):
    """Of 7 batches, so that an epoch ends with a step of one."""
    run = Run(method, accumulate).epoch().epoch()
    net, opt = written_out(method, accumulate, epochs=2)
    assert same(run.net, net)
    assert (run.opt.steps, run.opt.evaluations) == (opt.steps, opt.evaluations)
    assert run.opt.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    assert run.losses[0] == loss_of(make_net(), DATA[0]).item()


def test_bf16():
    assert same(Run("LookSAM", precision="bf16").epoch().net, written_out("LookSAM", dtype=torch.bfloat16)[0])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("init_scale", [2.0**10, 2.0**127], ids=["", "overflow"])
def test_a_loss_scale(init_scale, accumulate):
    """Accelerate has no fp16 on a CPU; the loss scale that it has on a GPU works on float32 as well."""
    print("Accelerate gives no loss scale to a CPU: it is put in place, and gradients are float32")
    scale = {"init_scale": init_scale, "growth_interval": 3, "backoff_factor": 2.0**-20}
    run = Run("LookSAM", accumulate, torch.amp.GradScaler("cpu", **scale)).epoch().epoch()
    scaler = torch.amp.GradScaler("cpu", **scale)
    net, opt = written_out("LookSAM", accumulate, scaler, epochs=2)
    assert same(run.net, net)
    assert run.opt.skips == opt.skips
    assert (run.opt.skips > 0) == (init_scale > 2.0**100)
    assert run.accelerator.scaler.get_scale() == scaler.get_scale() != init_scale


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping(scaled):
    """SAM keeps nothing of its gradients: clipping the second is the optimizer's own, but for rounding."""
    run = Run(clip=1.0, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None)
    if scaled:  # what Accelerate asks before it unscales
        run.accelerator.native_amp, run.accelerator.state._mixed_precision = True, "fp16"
    run.epoch()
    net, _ = written_out(max_grad_norm=1.0)
    for ours, theirs in zip(run.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not same(net, written_out()[0])


def test_a_closure_needs_no_integration():
    """Where nothing is accumulated or scaled."""
    run = Run("LookSAM")
    for batch in run.loader:

        def closure(batch=batch):
            run.optimizer.zero_grad()
            loss = loss_of(run.net, batch)
            run.accelerator.backward(loss)
            return loss

        run.optimizer.step(closure)
        run.rates.step()
    assert same(run.net, written_out("LookSAM")[0])


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_bit_exact(method, tmp_path):
    """From between two looks."""
    run = Run(method).epoch()
    run.accelerator.save_state(str(tmp_path))
    resumed = Run(method)
    resumed.accelerator.load_state(str(tmp_path))
    assert same(resumed.epoch().net, run.epoch().net)
    assert resumed.opt.evaluations == run.opt.evaluations
    assert same(run.net, written_out(method, epochs=2)[0])


def test_another_optimizer_is_refused():
    run = Run()
    with pytest.raises(TypeError, match="one of samkern's, got SGD"):
        Passes(run.accelerator, run.net, SGD(run.net.parameters(), lr=0.1), loss_of)


def test_what_is_written_of_it(tmp_path, monkeypatch, capsys):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    run_all_about("accelerate", tmp_path, monkeypatch, capsys)
