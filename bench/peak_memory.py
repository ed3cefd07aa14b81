"""What a training step needs at its peak beyond the weights: gradients, state, copies, activations and what passes make.

``python -m bench.peak_memory [--device cuda]`` trains real models with each method and its counterparts, prints a table and
writes it to ``memory.csv`` of the device. What is counted is what torch's allocator hands out, over enough steps for two
looks; peers run in the setting in which they need least, with first gradients freed before the second pass.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import samkern
from samkern.backends import _build_facts

from . import machine, nets, peers
from .memory import peak_allocated

# The second step finds all state in place; a LookSAM's second look is that of its step K.
STEPS = {"LookSAM": peers.K + 1}


def mlp(width: int = 1024, depth: int = 6) -> nn.Sequential:
    """Activations take little: weights and what is of their size decide."""
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.ReLU(), *layers, nn.Linear(width, 10))


MODELS: dict[str, tuple[Callable[[], nn.Sequential], int]] = {
    "MLP, batch 8": (mlp, 8),
    "ResNet-18, batch 8": (nets.resnet18, 8),
}


class ByClosure:
    """samkern's ``step(closure)``, which chooses itself when it looks."""

    def __init__(self, w: list[Tensor], make: Callable[..., Any], **options: Any) -> None:
        self.params = [nn.Parameter(x) for x in w]
        self.opt = make(self.params, SGD, **options, **peers.OPTIONS)

    def step(self, backward: Callable[[], Tensor]) -> None:
        def closure() -> Tensor:
            self.opt.zero_grad()
            return backward()

        self.opt.step(closure)


class ByHalves:
    """A peer, whose first gradients are freed before the second pass, as are the last ones before the first."""

    def __init__(self, stepper: Any) -> None:
        self.stepper, self.params = stepper, stepper.params

    def step(self, backward: Callable[[], Tensor]) -> None:
        self._free()
        backward()
        looks = self.stepper.looks()
        self.stepper.first()
        if looks:
            self._free()
            backward()
        self.stepper.second()

    def _free(self) -> None:
        for p in self.params:
            p.grad = None


class Plain:
    """SGD alone, fused."""

    def __init__(self, w: list[Tensor]) -> None:
        self.params = [nn.Parameter(x) for x in w]
        self.base = SGD(self.params, fused=True, **peers.OPTIONS)

    def step(self, backward: Callable[[], Tensor]) -> None:
        self.base.zero_grad()
        backward()
        self.base.step()


def ours(make: Callable[..., Any], **options: Any) -> Callable[[list[Tensor]], Any]:
    return lambda w: ByClosure(w, make, **options)


def peer(make: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[list[Tensor]], Any]:
    return lambda w: ByHalves(make(w, *arguments, **options))


def pytorch_optimizer(cls: str, **options: Any) -> dict[str, Callable[[list[Tensor]], Any]]:
    return {
        f"pytorch_optimizer {'foreach' if foreach else 'default'}": peer(
            peers.PytorchOptimizer, cls, foreach=foreach, **options
        )
        for foreach in (False, True)
    }


LOOKSAM = {"rho": peers.RHO, "k": peers.K, "alpha": peers.ALPHA}
FREED = {"keep_gradients": False}
# The first of each method is what the results of those that compute the same are compared with.
METHODS: dict[str, dict[str, Callable[[list[Tensor]], Any]]] = {
    "none": {"SGD fused": Plain},
    "SAM": {
        "samkern": ours(samkern.SAM, rho=peers.RHO),
        "samkern keep_gradients=False": ours(samkern.SAM, rho=peers.RHO, **FREED),
        "eager loop": peer(peers.EagerLoop),
        "foreach + fused SGD": peer(peers.ForeachChain),
        **pytorch_optimizer("SAM"),
    },
    "ASAM": {
        "samkern": ours(samkern.ASAM, rho=peers.RHO, eta=0.0),
        "samkern keep_gradients=False": ours(samkern.ASAM, rho=peers.RHO, eta=0.0, **FREED),
        **pytorch_optimizer("SAM", adaptive=True),
    },
    "LookSAM": {
        "samkern": ours(samkern.LookSAM, scope="tensor", **LOOKSAM),
        "samkern cache bfloat16": ours(samkern.LookSAM, scope="tensor", cache_dtype=torch.bfloat16, **LOOKSAM),
        **pytorch_optimizer("LookSAM"),
    },
    "SSAM-D": {"samkern keep_gradients=False": ours(samkern.SSAMD, rho=peers.RHO, total_steps=100, **FREED)},
    "AE-SAM": {"samkern keep_gradients=False": ours(samkern.AESAM, rho=peers.RHO, total_steps=100, **FREED)},
    "MSAM": {"samkern": ours(samkern.MSAM, rho=peers.RHO)},
}


@dataclass
class Row:
    """One measurement. ``peak_bytes``: beyond the weights, and ``of_weights`` the same in multiples of theirs."""

    model: str
    method: str
    candidate: str
    n_params: int
    peak_bytes: int
    of_weights: float
    max_err: float
    device: str
    threads: int
    torch: str
    samkern: str
    commit: str
    time: str


def train(
    model_name: str, make: Callable[[list[Tensor]], Any], n_steps: int, device: torch.device
) -> tuple[int, list[Tensor]]:
    """Peak beyond the weights, and the weights in the end."""
    torch.manual_seed(0)
    make_model, batch = MODELS[model_name]
    model = make_model().to(device)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    trained: list[Tensor] = []

    def backward() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    def run() -> None:
        stepper = make([p.detach() for p in model.parameters()])
        adopt(model, stepper.params)
        for _ in range(n_steps):
            stepper.step(backward)
        trained.extend(stepper.params)

    return peak_allocated(run, device), [p.detach().cpu() for p in trained]


def adopt(model: nn.Module, params: list[nn.Parameter]) -> None:
    """Puts ``params`` in place of the model's, in their order."""
    new = iter(params)
    for module in model.modules():
        for name in module._parameters:
            if module._parameters[name] is not None:
                module._parameters[name] = next(new)


def difference(ends: list[Tensor], judge: list[Tensor]) -> float:
    largest = max(float(x.abs().max()) for x in judge)
    return max(float((x - other).abs().max()) for x, other in zip(ends, judge, strict=True)) / largest


def measure(device: torch.device) -> Iterator[Row]:
    """All candidates; one that computes something else than the first of its method is an error."""
    for model_name in MODELS:
        for method, candidates in METHODS.items():
            judge: list[Tensor] = []
            for name, make in candidates.items():
                peak, ends = train(model_name, make, STEPS.get(method, 2), device)
                judge = judge or ends
                error = difference(ends, judge)
                assert error < 1e-3, f"{method}, {name}: weights differ by {error}"
                yield row(model_name, method, name, peak, ends, error, device)


def row(model: str, method: str, name: str, peak: int, ends: list[Tensor], error: float, device: torch.device) -> Row:
    n_params = sum(p.numel() for p in ends)
    return Row(
        model=model,
        method=method,
        candidate=name,
        n_params=n_params,
        peak_bytes=peak,
        of_weights=round(peak / (4 * n_params), 3),
        max_err=error,
        device=machine.folder(device).name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        samkern=samkern.__version__,
        commit=(_build_facts() or {}).get("commit", "unknown"),
        time=time.strftime("%Y-%m-%dT%H:%M:%S"),
    )


def table(rows: list[Row]) -> str:
    """A line per candidate, in Markdown: MB, and multiples of the weights."""
    models = list(dict.fromkeys(row.model for row in rows))
    of = {(row.model, row.method, row.candidate): row for row in rows}
    lines = [f"| method | | {' | '.join(models)} |", "| --- " * (2 + len(models)) + "|"]
    for method, name in dict.fromkeys((row.method, row.candidate) for row in rows):
        cells = [of[model, method, name] for model in models]
        numbers = " | ".join(f"{cell.peak_bytes / 1e6:.0f} MB, {cell.of_weights:.2f} x" for cell in cells)
        lines.append(f"| {method} | {name} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    rows = []
    folder = machine.folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "memory.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for one in measure(device):
            rows.append(one)
            writer.writerow(asdict(one))
            file.flush()
    print(table(rows))


if __name__ == "__main__":
    main()
