"""One run of the training study: a method, a seed, and everything that has to be kept to stop and go on bit-exactly."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from torch.utils.data import Dataset

import samkern
from samkern import RunFolder, SampleLosses
from samkern.backends import resolve
from samkern.history import History
from samkern.sharpness import Measurement
from samkern.undisturbed import unchanged_buffers

from . import cifar, nets
from .atomic_save import atomic_save
from .step_clock import Step, StepClock
from .train_log import Row, StudyError, commit, facts

TEST_BATCH = 1000
MEASURED = 1024  # images that flatness is measured on
MEASURES = ("epsilon_sharpness", "adaptive_sharpness", "fisher_rao")


def methods() -> dict[str, type[Optimizer]]:
    """Plain SGD, and every method that samkern exports and that needs no adapters, by lower-cased name."""
    others = ("SharpnessAware", "FlatLoRA", "LoRASAM")
    exported = {name: getattr(samkern, name) for name in samkern.__all__ if name not in others}
    ours = {
        name.lower(): value
        for name, value in exported.items()
        if isinstance(value, type) and issubclass(value, samkern.SharpnessAware)
    }
    return {"sgd": SGD, **ours}


@dataclass(frozen=True)
class Entry:
    """A method by name, and its own options."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> str:
        """The options as text."""
        return " ".join(f"{name}={value}" for name, value in self.options.items())


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share. ``warm_up``: epochs in which the learning rate rises to ``lr``, before cosine."""

    epochs: int
    images: int
    batch: int
    width: int
    lr: float = 0.1
    warm_up: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    compiled: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def lr_factor(self, step: int) -> float:
        """Share of ``lr`` in step ``step``, counted from 0."""
        warm_up, total = round(self.warm_up * self.steps_per_epoch), self.total_steps
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, total - warm_up))


def make_optimizer(entry: Entry, setting: Setting, model: nn.Module, data: cifar.Cifar | None = None) -> Optimizer:
    """SGD with momentum, or ``entry``'s method around it. ``data``: for methods that ask for losses of single samples.

    Raises:
        ValueError, TypeError: an option is unknown or out of range.
    """
    base: dict[str, Any] = {"lr": setting.lr, "momentum": setting.momentum, "weight_decay": setting.weight_decay}
    make = methods()[entry.method]
    if make is SGD:
        # The fastest SGD that torch has is what the others' time is compared with.
        fused = next(model.parameters()).is_cuda
        return SGD(model.parameters(), **{"fused": fused, **base, **entry.options})
    asked = inspect.signature(make).parameters
    if "total_steps" in asked:
        base["total_steps"] = setting.total_steps
    if "sample_losses" in asked and data is not None and entry.options.get("fisher", "sample") == "sample":
        base["sample_losses"] = SampleLosses(model, functional.cross_entropy, Normalised(data))
    return make(model.parameters(), SGD, model=model, **{**base, **entry.options})


def n_validation(entry: Entry, setting: Setting) -> int:
    """Training images that are held out for a method with a learned radius: a tenth."""
    learns = issubclass(methods()[entry.method], (samkern.LETSSAM, samkern.LETSASAM))
    return setting.images // 10 if learns else 0


class Normalised(Dataset[tuple[Tensor, Tensor]]):
    """The training images as the net sees them, without augmentation."""

    def __init__(self, data: cifar.Cifar) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.train_y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.data.normalised(self.data.train_x[i : i + 1])[0], self.data.train_y[i]


class Run:
    """Trains epoch by epoch. ``rows`` has a row for each epoch so far; ``pairs`` counts calls of the closure."""

    def __init__(self, entry: Entry, seed: int, setting: Setting, data: cifar.Cifar, device: torch.device) -> None:
        self.validation: cifar.Cifar | None = None
        if held_out := n_validation(entry, setting):
            setting = replace(setting, images=setting.images - held_out)
            data, self.validation = data.held_out(held_out)
        self.entry, self.seed, self.setting, self.data, self.device = entry, seed, setting, data, device
        torch.manual_seed(seed)
        self.net = nets.resnet18(setting.width).to(device, memory_format=torch.channels_last)
        self.forward = torch.compile(self.net) if setting.compiled else self.net
        self.opt = make_optimizer(entry, setting, self.net, data)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.opt, setting.lr_factor)
        self.seconds, self.pairs = 0.0, 0
        self.rows: list[Row] = []

    @property
    def finished(self) -> bool:
        return len(self.rows) == self.setting.epochs

    def train_epoch(self, history: History | None = None) -> Row:
        """One epoch of training, and the test. Nothing in the loop over batches waits for the device.

        ``history``: of the optimizer, which is flushed at the end.
        """
        epoch = len(self.rows) + 1
        clock = StepClock(self.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        n_right = torch.zeros((), dtype=torch.int64, device=self.device)
        draws = self.draws(epoch)
        self.net.train()
        start = time.perf_counter()
        for i, (x, y) in enumerate(cifar.batches(self.data, self.setting.batch, self.seed, epoch)):
            answers: list[Tensor] = []
            step = clock.begin()
            others = {} if draws is None else {"val_closure": self.val_closure(draws[i], clock, step)}
            loss = self.opt.step(self.closure(x, y, clock, step, answers), **others)
            step.end = clock.now()
            if history is not None:
                history.record()
            self.schedule.step()
            loss_sum += loss.detach()
            n_right += (answers[0].argmax(1) == y).sum()  # before any climb, but that of methods with one pass
        train_loss = loss_sum.item() / self.setting.steps_per_epoch
        self.seconds += time.perf_counter() - start
        if history is not None:
            history.flush()
        self.pairs += sum(len(step.pairs) for step in clock.steps)
        train_accuracy = 100 * n_right.item() / (self.setting.steps_per_epoch * self.setting.batch)
        test_accuracy = self.test()
        milliseconds, own_share = clock.summary()
        row = Row(
            method=self.entry.method,
            options=self.entry.written,
            seed=self.seed,
            epoch=epoch,
            epochs=self.setting.epochs,
            images=self.setting.images,
            batch=self.setting.batch,
            width=self.setting.width,
            train_loss=round(train_loss, 5),
            train_accuracy=round(train_accuracy, 3),
            test_accuracy=round(test_accuracy, 3),
            gap=round(train_accuracy - test_accuracy, 3),
            seconds=round(self.seconds, 2),
            pairs=self.pairs,
            ms_per_step=round(milliseconds, 4),
            own_share=round(own_share, 4),
            **facts(self.device, self.backend(), self.setting.compiled),
        )
        self.rows.append(row)
        return row

    def backend(self) -> str:
        """What does the optimizer's arithmetic."""
        return "torch" if type(self.opt) is SGD else resolve(self.device, self.entry.options.get("backend"))

    def closure(
        self, x: Tensor, y: Tensor, clock: StepClock, step: Step, answers: list[Tensor]
    ) -> Callable[[], Tensor]:
        """Zeroes the gradients, computes the loss, calls backward, returns the loss; notes when, and what the net said."""

        def closure() -> Tensor:
            begin = clock.now()
            self.opt.zero_grad()
            with self.precision():
                answer = self.forward(x)
                loss = functional.cross_entropy(answer, y, label_smoothing=self.setting.label_smoothing)
            loss.backward()
            answers.append(answer.detach())
            step.pairs.append((begin, clock.now()))
            return loss

        return closure

    def draws(self, epoch: int) -> Tensor | None:
        """Which validation images each step of an epoch takes, if the method takes any."""
        if self.validation is None:
            return None
        return cifar.draws(self.validation, self.setting.batch, self.setting.steps_per_epoch, self.seed, epoch)

    def val_closure(self, drawn: Tensor, clock: StepClock, step: Step) -> Callable[[], Tensor]:
        """As ``closure``, on validation images without augmentation, which only the steps that call it take."""
        validation = self.validation
        assert validation is not None

        def closure() -> Tensor:
            x = validation.normalised(validation.train_x[drawn])
            return self.closure(x, validation.train_y[drawn], clock, step, [])()

        return closure

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 autocast on a GPU; on the CPU float32, which is faster there."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    @contextlib.contextmanager
    def tested(self) -> Iterator[None]:
        """In the block, the net is what the method has to show: the average, if it has begun one."""
        average = getattr(self.opt, "average", None)
        noisy = isinstance(self.opt, samkern.LPFSGD)
        if not noisy and (average is None or average.n_averaged == 0):
            yield
            return
        with unchanged_buffers(self.net) if average is None else average.swapped(self.net):
            # Statistics of BatchNorm are those of other weights: of some thousand images they are good enough.
            images = torch.split(self.data.train_x[: 50 * self.setting.batch], self.setting.batch)
            with self.precision():
                samkern.update_bn(self.net, map(self.data.normalised, images))
            yield

    @torch.no_grad()
    def test(self) -> float:
        """Share of right answers on the test images, in per cent."""
        with self.tested():
            self.net.eval()
            n_right = torch.zeros((), dtype=torch.int64, device=self.device)
            parts = zip(self.data.test_x.split(TEST_BATCH), self.data.test_y.split(TEST_BATCH), strict=True)
            for images, y in parts:
                with self.precision():
                    n_right += (self.net(self.data.normalised(images)).argmax(1) == y).sum()
        return 100 * n_right.item() / len(self.data.test_y)

    def flatness(self) -> dict[str, Measurement]:
        """Measures on some training images, without augmentation and label smoothing, in float32."""
        x, y = self.data.train_x[:MEASURED], self.data.train_y[:MEASURED]
        batches = [
            (self.data.normalised(images), labels)
            for images, labels in zip(x.split(self.setting.batch), y.split(self.setting.batch), strict=True)
        ]
        with self.tested():
            return samkern.sharpness.flatness(self.net, functional.cross_entropy, batches, MEASURES, progress=False)

    # ---- on record, for samkern.report

    def folder(self, runs: Path, resume: bool) -> RunFolder:
        """Its folder below ``runs``. Another setting has another one."""
        s = self.setting
        images = s.images + (0 if self.validation is None else len(self.validation.train_y))
        of_setting = f"{images}-images-{s.epochs}-epochs-width-{s.width}-batch-{s.batch}"
        method = f"{self.entry.method} {self.entry.written}".strip()
        return RunFolder(
            runs / of_setting / self.name,
            method=method,
            seed=self.seed,
            settings=asdict(s),
            device=self.device,
            resume=resume,
            commit=commit(),
        )

    def history(self, folder: RunFolder) -> contextlib.AbstractContextManager[History | None]:
        """That of its steps, which the epochs flush. Plain SGD has none."""
        if not isinstance(self.opt, samkern.SharpnessAware):
            return contextlib.nullcontext()
        return folder.history(self.opt, flush_every=self.setting.steps_per_epoch + 1)

    # ---- checkpoints: batches depend on (seed, epoch) alone, so there is no state of the input to keep

    @property
    def name(self) -> str:
        """The run's file name without ending."""
        return "-".join([self.entry.method, *self.entry.written.split(), f"seed{self.seed}"]).replace("/", "_")

    def save(self, path: Path) -> None:
        """Writes a checkpoint; ``path`` has the old one or the whole new one, whenever it is interrupted."""
        state = {
            "setting": asdict(self.setting),
            "net": self.net.state_dict(),
            "opt": self.opt.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": self.generators(),
            "seconds": self.seconds,
            "pairs": self.pairs,
            "rows": [asdict(row) for row in self.rows],
        }
        atomic_save(state, path)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            StudyError: it is of another setting. Nothing has been loaded then.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        ours = asdict(self.setting)
        for name, value in state["setting"].items():
            if value != ours[name]:
                raise StudyError(f"{path} was made with {name} {value}, this run has {ours[name]}; drop --resume")
        self.net.load_state_dict(state["net"])
        self.opt.load_state_dict(state["opt"])
        self.schedule.load_state_dict(state["schedule"])
        self.seconds, self.pairs = state["seconds"], state["pairs"]
        self.rows = [Row(**row) for row in state["rows"]]
        torch.set_rng_state(state["generators"]["cpu"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"].cpu(), self.device)

    def generators(self) -> dict[str, Tensor]:
        """torch's own random state: a net with dropout would draw from it."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states
