"""Sharded parameters for tests: lists with gradients by a formula, nets under ``fully_shard``, and what a run leaves.

Everything runs in one process too, on whole tensors: that is what ranks are compared with.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import samkern

from .lists import FP32, FP64

# Rows that do not divide by 2 or 4, or are fewer than the ranks, so that some have nothing.
SHAPES = [(13, 5), (13,), (3, 13), (1,), (6, 2, 3, 3), (16, 4)]
MOMENTUM = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}


def whole(x: Tensor) -> Tensor:
    """All of it, on every rank."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def spread(x: Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    """This rank's part of what every rank has."""
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


@contextlib.contextmanager
def counted(kind: str = "all_reduce"):
    """Counts the calls of a collective."""
    calls, original = [], getattr(dist, kind)

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    setattr(dist, kind, counting)
    try:
        yield calls
    finally:
        setattr(dist, kind, original)


# ---- lists whose gradients are a formula, entry by entry: no model, and no collective but ours


def rows(n: int) -> tuple[DeviceMesh, Callable[[int, Tensor], list[Any]]]:
    """As ``fully_shard`` does."""
    return init_device_mesh("cpu", (n,)), lambda i, x: [Shard(0)]


def replicated_rows(n: int) -> tuple[DeviceMesh, Callable[[int, Tensor], list[Any]]]:
    """As ``fully_shard`` does on a mesh of two dimensions."""
    return init_device_mesh("cpu", (2, n // 2)), lambda i, x: [Replicate(), Shard(0)]


def grid(n: int) -> tuple[DeviceMesh, Callable[[int, Tensor], list[Any]]]:
    """As with tensor parallelism: along rows and columns, along rows twice, or along one dimension of the mesh only."""

    def placements(i: int, x: Tensor) -> list[Any]:
        choices = [
            [Shard(0), Shard(x.dim() - 1)],
            [Shard(0), Shard(0)],
            [Replicate(), Shard(0)],
            [Shard(0), Replicate()],
        ]
        return choices[i % 4]

    return init_device_mesh("cpu", (2, n // 2)), placements


def partly(n: int) -> tuple[DeviceMesh, Callable[[int, Tensor], list[Any] | None]]:
    """Every other tensor is whole on every rank."""
    return init_device_mesh("cpu", (n,)), lambda i, x: [Shard(0)] if i % 2 == 0 else None


LAYOUTS = {"rows": rows, "replicated_rows": replicated_rows, "grid": grid, "partly": partly}


@dataclass(frozen=True)
class Case:
    """A method over a list, and what happens to it."""

    cls: type
    options: dict[str, Any]
    base: type = torch.optim.SGD
    base_options: dict[str, Any] = field(default_factory=lambda: dict(MOMENTUM))
    dtypes: tuple[torch.dtype, ...] = (FP64,)
    missing: tuple[int, int] | None = None  # a step and a pass in which the first tensor has no gradient
    poisoned: tuple[int, int] | None = None  # the same with a NaN in one entry of the third
    groups: Callable[[list[Tensor]], Any] = list
    scale: float | None = None  # of a loss scaler
    n_steps: int = 5
    options_of_step: dict[str, Any] = field(default_factory=dict)

    def make(self, params: list[Tensor], **more: Any) -> samkern.SharpnessAware:
        options = dict(self.options)
        if "samples" in options:
            options["sample_losses"] = _SampleLosses(params, options.pop("samples"))
        return self.cls(self.groups(params), self.base, **options, **self.base_options, **more)


class _SampleLosses:
    """Losses whose gradients are a formula too."""

    def __init__(self, params: list[Tensor], n: int) -> None:
        self._params, self._n = params, n

    def __call__(self):
        for j in range(self._n):
            terms = [(noise_like(p, 1000 + 10 * j + i) * p).sum() for i, p in enumerate(self._params)]
            yield sum(x.full_tensor() if isinstance(x, DTensor) else x for x in terms)


class Rows(nn.Parameter):
    """Some rows of a tensor, which knows whose: what another process might have."""

    of: torch.Size
    which: slice


def rows_of(x: Tensor, which: slice) -> Rows:
    part = Rows(x[which].clone())
    part.of, part.which = x.shape, which
    return part


def part_as(p: Tensor, x: Tensor) -> Tensor:
    """Of ``x``, which is whole, what this process has of ``p``."""
    if isinstance(p, DTensor):
        return spread(x, p.device_mesh, list(p.placements))
    return x[p.which] if isinstance(p, Rows) else x


def whole_shape(p: Tensor) -> torch.Size:
    return p.of if isinstance(p, Rows) else p.shape


def noise_like(p: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(whole_shape(p), generator=generator, dtype=FP64, device="cpu")
    return part_as(p, x.to(p.device, p.dtype))


def initial(case: Case, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(3)
    device = torch.get_default_device()
    dtypes = [case.dtypes[i % len(case.dtypes)] for i in range(len(shapes))]
    return [
        torch.randn(shape, generator=generator, dtype=FP64, device="cpu").to(device, dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def gradient(p: Tensor, i: int, t: int) -> Tensor:
    """Of a quadratic with another slope in every step: at ``w + eps`` it is another one."""
    return noise_like(p, 7 + i).square() * p.detach() + noise_like(p, 100 * t + i)


@dataclass
class Left:
    """What a run has left, on whole tensors."""

    weights: list[Tensor]
    reports: list[tuple[Any, ...]]
    skips: int
    cache_norm: Tensor
    masks: list[Tensor | None]
    collectives: list[int]  # all-reduces of each step, of the list runs
    plan: str


def take_steps(
    case: Case, params: list[Tensor], steps: range, opt: samkern.SharpnessAware
) -> tuple[list[Any], list[int]]:
    reports, collectives = [], []
    scaler = None if case.scale is None else torch.amp.GradScaler("cpu", init_scale=case.scale, growth_interval=2)
    for t in steps:
        passes = iter(range(9))

        def closure(t: int = t, passes: Any = passes) -> Tensor:
            now = (t, next(passes))
            for i, p in enumerate(params):
                p.grad = None
                if now == case.missing and i == 0:
                    continue
                g = gradient(p, i, t)
                if scaler is not None:
                    g = g * float(scaler.scale(torch.ones(())))
                p.grad = g.to(p.dtype)
                if now == case.poisoned and i == 2:  # of all of it the last entry: one rank has it
                    _poison(p)
            return torch.tensor(1.0 + math.sin(t + now[1]), dtype=FP64)

        more: dict[str, Any] = {} if scaler is None else {"scaler": scaler}
        if "val_closure" in case.options_of_step:
            more["val_closure"] = lambda t=t, passes=passes: closure(t + 50, passes)
        with counted() if dist.is_initialized() else contextlib.nullcontext([]) as calls:
            opt.step(closure, **more)
        collectives.append(len(calls))
        if scaler is not None:
            scaler.update()
        last = opt.last_step
        reports.append((last.decision.name, float(last.grad_norm), float(last.second_norm or 0.0), bool(last.skipped)))
    return reports, collectives


def _poison(p: Tensor) -> None:
    """Of the last entry of the whole tensor, the gradient is NaN."""
    poison = torch.zeros(whole_shape(p), dtype=p.dtype, device=p.device)
    poison[-1].view(-1)[-1] = math.nan
    p.grad += part_as(p, poison)


def left_by(case: Case, params: list[Tensor], backend: str) -> Left:
    opt = case.make(params, backend=backend)
    reports, collectives = take_steps(case, params, range(case.n_steps), opt)
    return left(opt, params, reports, collectives)


def left(opt: samkern.SharpnessAware, params: list[Tensor], reports: list[Any], collectives: list[int]) -> Left:
    kept, plan = opt._keeper.kept, opt._keeper.plan()
    masks = [None if mask is None else whole(mask) for mask in opt.masks()]
    name = type(getattr(plan, "_inner", plan)).__name__
    return Left([whole(p) for p in params], reports, opt.skips, kept.cache_norm.clone(), masks, collectives, name)


def alone(case: Case, backend: str = "reference") -> Left:
    """Whole tensors, in this process."""
    return left_by(case, [nn.Parameter(x) for x in initial(case)], backend)


def among_ranks(cases: dict[str, Case], layout: str, backend: str) -> dict[str, Left]:
    """Their parts, on a rank."""
    mesh, placements = LAYOUTS[layout](dist.get_world_size())
    results = {}
    for name, case in cases.items():
        params = []
        for i, x in enumerate(initial(case)):
            how = placements(i, x)
            params.append(nn.Parameter(x if how is None else spread(x, mesh, how)))
        results[name] = left_by(case, params, backend)
    return results


# ---- nets


class Net(nn.Module):
    """Uneven shards, one that is empty on some ranks, a frozen and an unused tensor."""

    share = (0, 1)  # which part of a batch is its, of how many

    def __init__(self) -> None:
        super().__init__()
        self.dtype = FP32  # of batches
        self.first = nn.Linear(5, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x + self.frozen)))
        return self.head(torch.tanh(self.second(x)))


def make_net(dtype: torch.dtype = FP32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().to(dtype)
        net.dtype = dtype
        return net


def sharded(net: Net, how: str) -> Net:
    """``net`` as users would have it: ``how`` is a way to shard it."""
    n = dist.get_world_size()
    mesh, options, net.share = init_device_mesh("cpu", (n,)), {}, (dist.get_rank(), n)
    if how == "replicated":
        mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("replicate", "shard"))
    elif how == "tensor_parallel":
        both = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(net, both["tensor"], {"first": ColwiseParallel(output_layouts=Replicate())})
        parallelize_module(net, both["tensor"], {"second": ColwiseParallel(), "head": RowwiseParallel()})
        mesh, net.share = both["data"], (both.get_local_rank("data"), 2)
    elif how == "kept":
        options = {"reshard_after_forward": False}
    elif how == "mixed":
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=FP32)}
    fully_shard(net.second, mesh=mesh, **options)
    if how != "partly":
        fully_shard(net, mesh=mesh, **options)
    return net


def batch(t: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    """16 rows; a rank takes its share of them."""
    generator = torch.Generator().manual_seed(1000 + t)
    x, y = torch.randn(16, 5, generator=generator), torch.randn(16, 3, generator=generator)
    return x.to(dtype), y.to(dtype)


def my_rows(net: Net, x: Tensor) -> Tensor:
    index, count = net.share
    return x.chunk(count)[index]


def closure_for(net: Net, t: int, opt: Any, scaler: torch.amp.GradScaler | None = None) -> Callable[[], Tensor]:
    """Of this rank's rows. Gradients of what is not sharded are averaged over ranks here.

    With a scaler, step 5 has one row whose gradient overflows with a scale as large as 2^126.
    """
    x, y = batch(t, net.dtype)
    if scaler is not None and t == 5:
        y[0] *= 1e3
    x, y = my_rows(net, x), my_rows(net, y)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (net(x) - y).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        average_plain(net)
        return loss.detach()

    return closure


def average_plain(net: Net) -> None:
    for p in net.parameters():
        if net.share[1] > 1 and p.grad is not None and not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= net.share[1]


def sample_losses(net: nn.Module, n: int = 6) -> Callable[[], Any]:
    """The same samples on every rank."""
    x, y = batch(77)
    return lambda: ((net(x[j : j + 1]) - y[j : j + 1]).square().mean() for j in range(n))


def train(how: str, case: Case, steps: int, backend: str | None, feature: str = "") -> Left:
    """Trains a net that is sharded ``how``, or one process's for "whole"."""
    dtype = case.dtypes[0]
    net = make_net(dtype)
    if how != "whole":
        sharded(net, how)
    params = list(net.parameters())
    opt = (
        case.make(params, backend=backend, model=net)
        if "samples" not in case.options
        else _with_samples(case, net, backend)
    )
    scaler = None if case.scale is None else torch.amp.GradScaler("cpu", init_scale=case.scale, growth_interval=4)
    reports, collectives = [], []
    for t in range(steps):
        with counted() as calls:
            WAYS[feature](net, opt, t, scaler)
        collectives.append(sum(args[0].dtype == FP64 for args in calls))  # gradients are in float32
        last = opt.last_step
        reports.append((last.decision.name, float(last.grad_norm), float(last.second_norm or 0.0), bool(last.skipped)))
    return left(opt, params, reports, collectives)


def _with_samples(case: Case, net: Net, backend: str | None) -> samkern.SharpnessAware:
    options = {name: value for name, value in case.options.items() if name != "samples"}
    losses = sample_losses(net, case.options["samples"])
    return case.cls(
        net.parameters(), case.base, sample_losses=losses, **options, **case.base_options, backend=backend, model=net
    )


def _closure(net: Net, opt: Any, t: int, scaler: Any) -> None:
    if scaler is None:
        opt.step(closure_for(net, t, opt))
    else:
        opt.step(closure_for(net, t, opt, scaler), scaler=scaler)
        scaler.update()


def _halves(net: Net, opt: Any, t: int, scaler: Any) -> None:
    """``first_step`` and ``second_step``, and gradients that are clipped in between if there is a scaler."""
    closure = closure_for(net, t, opt, scaler)
    closure()
    if opt.first_step(scaler=scaler):
        closure()
    if scaler is None:
        opt.second_step()
        return
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    scaler.step(opt)
    scaler.update()


def _accumulated(net: Net, opt: Any, t: int, scaler: Any) -> None:
    """Two micro-batches, of which gradients are reduced once."""

    def closure() -> Tensor:
        opt.zero_grad()
        total = torch.zeros(())
        for j, (x, y) in enumerate(zip(*(my_rows(net, part).chunk(2) for part in batch(t)), strict=True)):
            if hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(j == 1)
            loss = (net(x) - y).square().mean() / 2
            loss.backward()
            total += loss.detach()
        return total

    opt.step(closure)


WAYS = {"": _closure, "halves": _halves, "accumulated": _accumulated}


def averaged(how: str) -> dict[str, Any]:
    """An EMA and a SWAD along a training of a net that is sharded ``how``, or of one process's for "whole"."""
    net = make_net(FP32)
    if how != "whole":
        sharded(net, how)
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1)
    ema, swad = samkern.EMA(opt, 0.8), samkern.SWAD(opt, n_converge=1, on_host=True)
    outputs = []

    def look() -> None:
        with torch.no_grad():
            outputs.append(net(batch(99)[0]))

    for t in range(4):
        opt.step(closure_for(net, t, opt))
        swad.validate([1.0, 1.0, 5.0, 1.0][t])
    look()
    with ema.swapped(net):
        look()
    look()
    state = ema.state_dict()
    for t in range(4, 6):
        opt.step(closure_for(net, t, opt))
    before = [whole(x).clone() for x in ema.averages]
    ema.load_state_dict({**state, "averages": {i: whole(x).clone() for i, x in state["averages"].items()}})
    averages = [whole(x) for x in ema.averages]
    swad.copy_to_weights()
    look()
    again = all(map(torch.equal, averages, before))
    return {"outputs": outputs, "averages": averages, "again": again, "n": swad.n_averaged}
