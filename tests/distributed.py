"""One training, on the ranks of ``DistributedDataParallel`` or in one process on the whole batch, and what it leaves."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import samkern

from .lists import seeded
from .methods import OwnStepSGD

BATCH, CLASSES = 16, 3


def batch(t: int, part: int = 0, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """One of equal parts of batch ``t``."""
    generator = seeded(1000 + t)
    x = torch.randn(BATCH, 6, generator=generator)
    y = (x[:, :CLASSES] + 0.5 * torch.randn(BATCH, CLASSES, generator=generator)).argmax(1)
    return x.tensor_split(parts)[part], y.tensor_split(parts)[part]


def make_net(seed: int = 0, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Tanh(), nn.Linear(16, CLASSES)
        )


def sample_losses(net: nn.Module) -> samkern.SampleLosses:
    return samkern.SampleLosses(net, F.cross_entropy, batch(999), num_samples=8, progress=False)


SGD = {"cls": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
ADAM = {"cls": torch.optim.Adam, "lr": 0.01}
OWN_STEP = {**SGD, "cls": OwnStepSGD}


@dataclass
class Left:
    """What a training has left on a rank: ``state`` is the optimizer's ``state_dict``, ``buffers`` those of BatchNorm at w."""

    weights: torch.Tensor
    state: dict[str, Any]
    decisions: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    reductions: list[int] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)
    evaluations: int = 0
    skips: int = 0
    drew: bool = False


class Training:
    """``method`` on batches ``t = 0, 1, ...``; with a process group each rank has its part of them.

    ``ddp``: options of ``DistributedDataParallel``; None: the ranks have nothing in common but the optimizer. ``parts``: m-SAM.
    ``closed``: by closures, else by ``first_pass``, ``first_step``, ``second_step``. ``micro``: batches to accumulate.
    ``on_loss(t, i, loss)`` returns the loss to go on with in pass ``i`` of step ``t``; ``after_backward(t, i, net)`` may write
    to the gradients.
    """

    def __init__(
        self,
        method: str,
        options: dict[str, Any] | None = None,
        *,
        sync: str = "global",
        ddp: dict[str, Any] | None = {},  # noqa: B006
        parts: int = 1,
        closed: bool = True,
        micro: int = 1,
        norm: bool = False,
        counts: bool = False,
        on_loss: Callable[[int, int, torch.Tensor], torch.Tensor] = lambda t, i, loss: loss,
        after_backward: Callable[[int, int, nn.Module], None] = lambda t, i, net: None,
    ) -> None:
        group = (ddp or {}).get("process_group")
        self.rank, self.n_ranks = (
            (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
        )
        torch.manual_seed(100 + self.rank)  # nothing may depend on it
        self.net = make_net(seed=self.rank, norm=norm)  # DDP gives all of them rank 0's
        self.model, self.parts, self.closed, self.micro, self.after_backward = (
            self.net,
            parts,
            closed,
            micro,
            after_backward,
        )
        self.on_loss, self.reduced = on_loss, 0
        if dist.is_initialized() and ddp is not None:
            self.model = DistributedDataParallel(self.net, **ddp)
            if counts:
                self.model.register_comm_hook(None, self._count)
        options = dict(options or {})
        base = dict(options.pop("base", SGD))
        if options.get("sample_losses"):
            options["sample_losses"] = sample_losses(self.net)
        options = {"model": self.model, "perturb_sync": sync, **base, **options}
        self.opt = getattr(samkern, method)(self.model.parameters(), options.pop("cls"), **options)
        self.left = Left(torch.empty(0), {})
        if norm:
            self.net[1].register_forward_pre_hook(self._look_at_buffers)

    def _count(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.reduced += 1
        return allreduce_hook(None, bucket)

    def _look_at_buffers(self, module: nn.BatchNorm1d, args: Any) -> None:
        if module.track_running_stats:
            self.left.buffers.append(torch.stack([module.running_mean, module.running_var]))

    def run(self, steps: Iterable[int]) -> Left:
        rng = torch.get_rng_state()
        for t in steps:
            before = self.reduced
            self.step(t)
            record = self.opt.last_step
            self.left.decisions.append(record.decision.value)
            self.left.reasons.append(record.reason)
            self.left.reductions.append(self.reduced - before)
        self.left.drew = not torch.equal(torch.get_rng_state(), rng)
        self.left.weights = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        self.left.state = self.opt.state_dict()
        self.left.evaluations, self.left.skips = self.opt.evaluations, self.opt.skips
        if self.opt.mask is not None:
            self.left.masks = self.opt.masks()
        return self.left

    def step(self, t: int) -> None:
        closures = [self.closure(t, part) for part in range(self.parts)]
        validation = {"val_closure": self.closure(t + 500, 0)} if self.opt.learned is not None else {}
        if self.closed:
            self.opt.step(closures if self.parts > 1 else closures[0], **validation)
        elif self.opt.perturbation.before_pass:
            with self.opt.perturbed():
                closures[0]()
            self.opt.step()
        else:
            with self.opt.first_pass():
                closures[0]()
            if self.opt.first_step():
                closures[0]()
            self.opt.second_step()

    def closure(self, t: int, part: int) -> Callable[[], float]:
        passes = 0
        micro = [
            batch(t, (part * self.n_ranks + self.rank) * self.micro + i, self.parts * self.n_ranks * self.micro)
            for i in range(self.micro)
        ]

        def closure() -> float:
            nonlocal passes
            self.opt.zero_grad()
            total = 0.0
            for i, (x, y) in enumerate(micro):
                waits = i + 1 < len(micro) and isinstance(self.model, DistributedDataParallel)
                with self.model.no_sync() if waits else contextlib.nullcontext():
                    loss = F.cross_entropy(self.model(x), y) / len(micro)
                    self.on_loss(t, passes, loss).backward()
                total += loss.item()
            self.after_backward(t, passes, self.net)
            passes += 1
            return total

        return closure


def train(n_steps: int, *args: Any, **options: Any) -> Left:
    return Training(*args, **options).run(range(n_steps))


def with_options(options: dict[str, Any], *args: Any) -> Left:
    """``train`` with keywords, for ranks."""
    return train(*args, **options)


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two nested values are not bitwise the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return [f"{at}: {list(a)} and {list(b)}"]
        return [d for key in a for d in differences(a[key], b[key], f"{at}[{key!r}]")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{at}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{at}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        return [] if same else [f"{at}: {a} and {b}"]
    return [] if a == b or (a != a and b != b) else [f"{at}: {a!r} and {b!r}"]


def assert_same_everywhere(lefts: list[Left]) -> None:
    for i, left in enumerate(lefts[1:], 1):
        assert not differences(vars(lefts[0]), vars(left)), f"ranks 0 and {i} differ"


def assert_close(left: Left, right: Left) -> None:
    """But for the order of sums in float32."""
    torch.testing.assert_close(left.weights, right.weights, rtol=0, atol=1e-5)
