"""Lightning's Trainer takes the steps of a loop written out: bitwise, whatever it accumulates, clips, scales or resumes."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

import samkern

from .recipes import run_all_about

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: pip install samkern[lightning]")
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from samkern.integrations.lightning import SharpnessAwareModule  # noqa: E402

BASE = {"lr": 0.1, "momentum": 0.9}
METHODS = {
    "SAM": lambda p, **o: samkern.SAM(p, SGD, rho=0.1, **BASE, **o),
    "LookSAM": lambda p, **o: samkern.LookSAM(p, SGD, rho=0.1, k=3, **BASE, **o),
    "MSAM": lambda p, **o: samkern.MSAM(p, SGD, rho=0.1, **BASE, **o),
}
BATCHES, PER_BATCH = 7, 6
DATA = torch.utils.data.TensorDataset(
    torch.randn(BATCHES * PER_BATCH, 5, generator=torch.Generator().manual_seed(1)),
    torch.randint(0, 3, (BATCHES * PER_BATCH,), generator=torch.Generator().manual_seed(2)),
)
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def make_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class Net(SharpnessAwareModule):
    """What the loops below do, as a module; ``seen`` has what its hooks have seen."""

    def __init__(self, method="SAM", **options):
        super().__init__()
        self.layers, self.method, self.options = make_layers(), method, options
        self.seen = {"losses": [], "before_step": 0, "rates": []}

    def loss(self, batch):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if outputs:
            self.seen["losses"].append(outputs["loss"].item())

    def on_before_optimizer_step(self, optimizer):
        self.seen["before_step"] += 1

    def configure_optimizers(self):
        opt = METHODS[self.method](self.parameters(), model=self, **self.options)
        rates = torch.optim.lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=0.1, total_iters=10)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def loader(**options):
    return torch.utils.data.DataLoader(DATA, batch_size=PER_BATCH, **options)


def fit(net, *, ckpt_path=None, **options):
    """Trains, and returns the Trainer."""
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, **options})
    trainer.fit(net, loader(), ckpt_path=ckpt_path)
    return trainer


def half():
    """16-mixed on the CPU, where Lightning itself takes bfloat16 instead."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3))


class Loop:
    """The same training written out."""

    def __init__(self, method="SAM", accumulate=1, dtype=None, scaler=None, **options):
        self.layers = make_layers()
        self.opt = METHODS[method](self.layers.parameters(), model=self.layers, **options)
        self.rates = torch.optim.lr_scheduler.LinearLR(self.opt, start_factor=1.0, end_factor=0.1, total_iters=10)
        self.accumulate, self.dtype, self.scaler = accumulate, dtype, scaler
        self.losses = []

    def evaluate(self, batch):
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        scale = 1.0 if self.scaler is None else self.scaler.scale(torch.ones(()))
        (scale * (loss / self.accumulate)).backward()
        return loss.item() / self.accumulate

    def run(self, epochs=2):
        for _ in range(epochs):
            batches = list(loader())
            for start in range(0, len(batches), self.accumulate):
                self.step(batches[start : start + self.accumulate])
        return self

    def step(self, micro_batches):
        self.opt.zero_grad()
        if self.opt.perturbation.before_pass:
            with self.opt.perturbed():
                self.losses += map(self.evaluate, micro_batches)
            self.opt.step() if self.scaler is None else self.scaler.step(self.opt)
        else:
            self.losses += map(self.evaluate, micro_batches)
            if self.opt.first_step(scaler=self.scaler):
                for batch in micro_batches:
                    self.evaluate(batch)
            self.opt.second_step()
        if self.scaler is not None:
            self.scaler.update()
        self.rates.step()


def assert_same(net, loop):
    for (name, ours), theirs in zip(net.layers.state_dict().items(), loop.layers.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def assert_same_norms(trainer, loop):
    """Of first gradients, which are those of the loss, not of the scaled loss."""
    ours, theirs = trainer.optimizers[0].last_step.grad_norm, loop.opt.last_step.grad_norm
    assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_automatic_optimization(method):
    net, loop = Net(method), Loop(method).run()
    trainer = fit(net)
    assert_same(net, loop)
    opt = trainer.optimizers[0]
    assert (opt.steps, opt.evaluations) == (loop.opt.steps, loop.opt.evaluations) == (14, loop.opt.evaluations)
    assert trainer.global_step == net.seen["before_step"] == 14
    assert net.seen["losses"] == loop.losses  # those of first passes
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 14
    assert opt.step._wrapped_by_lr_sched  # as the scheduler has left it


def test_without_the_integration_a_closure_does():
    """Where nothing is accumulated, scaled or clipped: ``opt.step(closure)``, which logs twice."""

    class Bare(Net):
        optimizer_step = pl.LightningModule.optimizer_step

    net, loop = Bare("LookSAM"), Loop("LookSAM").run()
    assert fit(net).global_step == 14
    assert_same(net, loop)


@pytest.mark.parametrize("method", ["SAM", "LookSAM"])
def test_accumulation(method):
    """An epoch of 7 batches ends with a step of one, which Lightning weighs as one of three too."""
    net, loop = Net(method), Loop(method, accumulate=3).run()
    trainer = fit(net, accumulate_grad_batches=3)
    assert trainer.global_step == trainer.optimizers[0].steps == 6
    assert_same(net, loop)


def test_accumulation_is_one_large_batch():
    """Without BatchNorm, and up to rounding in float64."""

    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.layers[1] = nn.Identity()
            self.double()

        def loss(self, batch):
            return super().loss((batch[0].double(), batch[1]))

    small, large = Plain(), Plain()
    fit(small, accumulate_grad_batches=BATCHES, max_epochs=5)
    whole = torch.utils.data.DataLoader(DATA, batch_size=len(DATA))
    pl.Trainer(**QUIET, max_epochs=5).fit(large, whole)
    for ours, theirs in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.equal(small.layers[0].weight, make_layers()[0].weight.double())


def test_logs_have_the_first_pass():
    net = Net()
    trainer = fit(net, max_epochs=1)
    assert trainer.logged_metrics["loss_step"].item() == pytest.approx(net.seen["losses"][-1], rel=1e-6)
    assert trainer.logged_metrics["loss_epoch"].item() == pytest.approx(sum(net.seen["losses"]) / BATCHES, rel=1e-6)


def test_a_metric_can_tell_the_passes_apart():
    passes = []

    class Counting(Net):
        def training_step(self, batch, batch_idx):
            passes.append(self.in_second_pass)
            return {"loss": super().training_step(batch, batch_idx)}

    fit(Counting(), max_epochs=1, accumulate_grad_batches=2, limit_train_batches=2)
    assert passes == [False, False, True, True]


@pytest.mark.parametrize("method", METHODS)
def test_clipping_is_the_optimizers(method):
    """So that LookSAM keeps its part of an unclipped gradient."""
    net, loop = Net(method), Loop(method, max_grad_norm=0.2).run()
    trainer = fit(net, gradient_clip_val=0.2)
    assert_same(net, loop)
    assert trainer.optimizers[0].max_grad_norm == 0.2
    assert not torch.equal(Loop(method).run().layers[0].weight, net.layers[0].weight)


def test_an_optimizer_that_clips_keeps_its_norm():
    net, loop = Net(max_grad_norm=0.1), Loop(max_grad_norm=0.1).run()
    fit(net, gradient_clip_val=0.2)
    assert_same(net, loop)


def test_clipping_by_value():
    net, largest = Net(), []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            if not module.in_second_pass and module.layers[0].weight.grad is not None:
                largest.append(max(p.grad.abs().max().item() for p in module.parameters()))

    fit(net, gradient_clip_val=0.01, gradient_clip_algorithm="value", callbacks=[Watch()])
    assert max(largest) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="one of the gradients that OrthogonalPart mixes"):
        fit(Net("LookSAM"), gradient_clip_val=0.01, gradient_clip_algorithm="value")


@pytest.mark.parametrize("method", METHODS)
def test_16_mixed(method):
    net, plugin = Net(method), half()
    trainer = fit(net, plugins=plugin, accumulate_grad_batches=1 if method == "MSAM" else 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    loop = Loop(method, trainer.accumulate_grad_batches, torch.float16, scaler).run()
    assert_same(net, loop)
    assert plugin.scaler.state_dict() == scaler.state_dict()
    assert plugin.scaler.get_scale() > 2.0**10  # it has grown
    assert trainer.optimizers[0].skips == 0
    assert_same_norms(trainer, loop)


def test_16_mixed_clips_and_skips_what_overflows():
    net, plugin = Net("LookSAM"), half()
    plugin.scaler.load_state_dict({**plugin.scaler.state_dict(), "scale": 2.0**24})
    trainer = fit(net, plugins=plugin, gradient_clip_val=0.2, max_epochs=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    loop = Loop("LookSAM", 1, torch.float16, scaler, max_grad_norm=0.2).run(3)
    assert_same(net, loop)
    assert 0 < trainer.optimizers[0].skips == loop.opt.skips < 21
    assert plugin.scaler.get_scale() == scaler.get_scale() < 2.0**24


def test_bf16_mixed():
    net, loop = Net("LookSAM"), Loop("LookSAM", dtype=torch.bfloat16).run()
    fit(net, precision="bf16-mixed")
    assert_same(net, loop)


@pytest.mark.parametrize("plugins", [None, half], ids=["32", "16-mixed"])
def test_resuming_is_bit_exact(tmp_path, plugins):
    """From between two looks. After an epoch, since Lightning resumes no data loader that cannot resume itself."""

    def options():
        return {"plugins": plugins and plugins()}

    unbroken, broken, resumed = (Net("LookSAM") for _ in range(3))
    whole = fit(unbroken, **options())
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fit(broken, max_epochs=1, callbacks=[save], **{**options(), "enable_checkpointing": True})
    with torch.no_grad():
        resumed.layers[0].weight.zero_()
    trainer = fit(resumed, ckpt_path=tmp_path / "last.ckpt", **options())
    assert trainer.global_step == 14
    assert trainer.optimizers[0].evaluations == whole.optimizers[0].evaluations
    assert_same(resumed, unbroken)
    assert not torch.equal(broken.layers[0].weight, unbroken.layers[0].weight)


class Manual(Net):
    """Manual optimization in two halves, or with a closure."""

    def __init__(self, method="SAM", how="halves", **options):
        super().__init__(method, **options)
        self.automatic_optimization, self.how = False, how

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        losses = []

        def closure():
            opt.zero_grad()
            losses.append(self.loss(batch))
            self.manual_backward(losses[-1])
            return losses[-1]

        if self.how == "closure":
            opt.step(closure)
        elif self.how == "perturbed":
            with opt.perturbed():
                closure()
            opt.step()
        else:
            closure()
            if opt.first_step():
                closure()
            opt.second_step(zero_grad=True)
        self.lr_schedulers().step()
        return losses[0].detach()


@pytest.mark.parametrize("plugins", [None, half], ids=["32", "16-mixed"])
@pytest.mark.parametrize("how", ["halves", "closure", "perturbed"])
def test_manual_optimization(how, plugins):
    method = {"halves": "SAM", "closure": "LookSAM", "perturbed": "MSAM"}[how]
    net = Manual(method, how)
    trainer = fit(net, plugins=plugins and plugins())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) if plugins else None
    loop = Loop(method, dtype=torch.float16 if plugins else None, scaler=scaler).run()
    assert_same(net, loop)
    assert trainer.global_step == net.seen["before_step"] == 14
    assert (trainer.optimizers[0].steps, trainer.optimizers[0].evaluations) == (14, loop.opt.evaluations)
    assert_same_norms(trainer, loop)
    if plugins:
        assert trainer.precision_plugin.scaler.get_scale() == scaler.get_scale() > 2.0**10


def test_two_optimizers_that_are_toggled():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            body, head = self.layers[:2].parameters(), self.layers[3].parameters()
            return [METHODS["SAM"](body, model=self), SGD(head, lr=0.1)]

        def training_step(self, batch, batch_idx):
            body, head = self.optimizers()
            with body.toggle_model():
                body.zero_grad()
                self.manual_backward(self.loss(batch))
                if body.first_step():
                    self.manual_backward(self.loss(batch))
                body.second_step()
            with head.toggle_model():
                head.zero_grad()
                self.manual_backward(self.loss(batch))
                head.step()

    layers = make_layers()
    body, head = METHODS["SAM"](layers[:2].parameters(), model=layers), SGD(layers[3].parameters(), lr=0.1)
    for x, y in loader():
        body.zero_grad()
        nn.functional.cross_entropy(layers(x), y).backward()
        if body.first_step():
            nn.functional.cross_entropy(layers(x), y).backward()
        body.second_step()
        head.zero_grad()
        nn.functional.cross_entropy(layers(x), y).backward()
        head.step()
    net = Two()
    assert fit(net, max_epochs=1).global_step == 14
    assert all(map(torch.equal, net.layers.parameters(), layers.parameters()))


def test_what_fails_leaves_the_weights_and_can_go_on():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if self.in_second_pass and self.trainer.global_step == 3 and not self.seen.setdefault("failed", False):
                self.seen["failed"] = True
                raise OSError("the disk is full")
            return super().training_step(batch, batch_idx)

    net = Failing()
    with pytest.raises(OSError, match="the disk is full"):
        fit(net)
    loop = Loop()
    for batch in list(loader())[:3]:
        loop.step([batch])
    for ours, theirs in zip(net.layers.parameters(), loop.layers.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not net.in_second_pass
    assert fit(net, max_epochs=1).global_step == 7


def test_no_step_where_training_step_returns_none():
    class Sparse(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return METHODS["SAM"](self.parameters(), model=self)

    net, loop = Sparse(), Loop()
    loop.rates.step = lambda: None
    for batch in list(loader())[::2]:
        loop.step([batch])
    opt = fit(net, max_epochs=1).optimizers[0]
    assert opt.steps == 4
    assert "step" not in vars(opt)
    assert_same(net, loop)


def mistakes():
    class Plain(Net):
        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.1)

    class Forgetful(Net):
        def on_train_batch_start(self, batch, batch_idx):
            pass

    class Iterating(Net):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    class WithoutMixin(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization, self.layers = False, make_layers()

        def configure_optimizers(self):
            return METHODS["SAM"](self.parameters())

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.layers(batch[0]).sum())
            self.optimizers().first_step(zero_grad=True)

    return {
        "not ours": (Plain(), {}, TypeError, "must be one of samkern's, got LightningSGD"),
        "no batches": (Forgetful(), {}, RuntimeError, r"super\(\).on_train_batch_start"),
        "an iterator": (Iterating(), {}, RuntimeError, "cannot run twice on one batch"),
        "MSAM": (
            Net("MSAM"),
            {"accumulate_grad_batches": 2},
            RuntimeError,
            "accumulate_grad_batches=2 does not go with MSAM",
        ),
        "share_rng": (Net(share_rng=True), {}, RuntimeError, "share_rng=True needs step"),
        "halves of a wrapper": (WithoutMixin(), {}, TypeError, "LightningSAM, which wraps an optimizer of samkern"),
    }


@pytest.mark.parametrize("case", mistakes())
def test_mistakes_say_what_to_do(case):
    net, options, error, message = mistakes()[case]
    with pytest.raises(error, match=message):
        fit(net, **options)
    assert all(torch.equal(x, y) for x, y in zip(net.layers.parameters(), make_layers().parameters(), strict=True))


def test_what_is_written_of_it(tmp_path, monkeypatch, capsys):
    printed = run_all_about("lightning", tmp_path, monkeypatch, capsys)
    assert math.isfinite(float(printed.split()[-1]))
