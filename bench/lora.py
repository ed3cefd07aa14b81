"""What Flat-LoRA adds to a step of LoRA: time and memory, on a transformer of 24 layers.

``python -m bench.lora [--device cuda]`` takes steps with plain LoRA and with Flat-LoRA in turn, prints how they compare and
adds a row to ``lora.csv`` of the device. What is timed on the CPU is what the process takes of it: others that run beside it do
not count. Both train the same factors with AdamW; the model is our own, with adapters of rank 8 on
every linear layer of its blocks. What Flat-LoRA adds is work per weight, and the rest of a step is work per weight and token:
the share falls with the tokens of a batch.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

import samkern
from samkern.backends import _build_facts

from . import machine
from .memory import peak_allocated

BAR = 1.15


class LoRALinear(nn.Linear):
    """A frozen linear layer and trained factors."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__(d_in, d_out)
        self.requires_grad_(False)
        self.scaling = 2.0
        self.lora_A = nn.Parameter(torch.randn(rank, d_in) / d_in**0.5)
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.n_heads = max(1, width // 64)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)]).requires_grad_(False)
        self.qkv, self.out = LoRALinear(width, 3 * width, rank), LoRALinear(width, width, rank)
        self.up, self.down = LoRALinear(width, 4 * width, rank), LoRALinear(4 * width, width, rank)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """A language model with a head that shares the embedding."""

    def __init__(self, width: int, depth: int, rank: int, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.blocks = nn.Sequential(*[Block(width, rank) for _ in range(depth)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.embedding(tokens)) @ self.embedding.weight.T


@dataclass
class Row:
    """One measurement. ``*_ms``: medians of a step. ``ratio``: the median of ratios of neighbouring steps.

    ``*_peak_bytes``: of a step, beyond weights, gradients and state; ``largest_bytes``: of the largest adapted weight.
    """

    width: int
    depth: int
    rank: int
    tokens: int
    n_weights: int
    rounds: int
    plain_ms: float
    flat_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    plain_peak_bytes: int
    flat_peak_bytes: int
    largest_bytes: int
    device: str
    threads: int
    torch: str
    samkern: str
    commit: str
    time: str


class Rig:
    """A model and its optimizer."""

    def __init__(self, make: Callable[[nn.Module], Any], width: int, depth: int, rank: int, batch: Tensor) -> None:
        torch.manual_seed(0)
        self.model = Transformer(width, depth, rank).to(batch.device)
        self.opt, self.batch = make(self.model), batch

    def step(self) -> float:
        """Milliseconds of a step."""
        synchronise(self.batch.device)
        clock = time.perf_counter if self.batch.device.type == "cuda" else process_time
        begin = clock()
        self.opt.step(self.closure)
        synchronise(self.batch.device)
        return 1e3 * (clock() - begin)

    def closure(self) -> Tensor:
        self.opt.zero_grad()
        logits = self.model(self.batch)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.batch[:, 1:].flatten())
        loss.backward()
        return loss.detach()


def process_time() -> float:
    """Seconds that the process has had of one processor, on average of its threads."""
    return time.process_time() / torch.get_num_threads()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def flat(model: nn.Module) -> samkern.FlatLoRA:
    # All of the ramp is behind the second step: a first one has no noise.
    return samkern.FlatLoRA(model, AdamW, lr=1e-4, sigma=0.05, total_steps=1)


def measure(width: int, depth: int, rank: int, batch: Tensor, rounds: int) -> Row:
    """Steps of both in turn, after two of each; then the peak of one step of each."""
    rigs = [Rig(make, width, depth, rank, batch) for make in (plain, flat)]
    for rig in rigs:
        rig.step(), rig.step()
    check(rigs[1])
    times = [
        [rig.step() for rig in (rigs if i % 2 == 0 else rigs[::-1])][:: 1 if i % 2 == 0 else -1] for i in range(rounds)
    ]
    ratios = sorted(b / a for a, b in times)
    peaks = [peak_allocated(rig.step, batch.device) for rig in rigs]
    peaks[1] += sum(x.nbytes for x in rigs[1].opt.perturbation.scratch)  # there from the first step on
    weights = [x.weight for x in rigs[1].opt.perturbation.weights]
    return Row(
        width=width,
        depth=depth,
        rank=rank,
        tokens=batch.numel(),
        n_weights=sum(w.numel() for w in weights),
        rounds=rounds,
        plain_ms=round(statistics.median(a for a, _ in times), 1),
        flat_ms=round(statistics.median(b for _, b in times), 1),
        ratio=round(statistics.median(ratios), 4),
        ratio_low=round(ratios[rounds // 4], 4),
        ratio_high=round(ratios[rounds - 1 - rounds // 4], 4),
        plain_peak_bytes=peaks[0],
        flat_peak_bytes=peaks[1],
        largest_bytes=max(w.numel() * w.element_size() for w in weights),
        device=machine.folder(batch.device).name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        samkern=samkern.__version__,
        commit=(_build_facts() or {}).get("commit", "unknown"),
        time=time.strftime("%Y-%m-%dT%H:%M:%S"),
    )


def check(rig: Rig) -> None:
    """What has no noise, or writes a weight, is never timed."""
    first = rig.opt.perturbation.weights[0].weight
    x, layer, before = torch.eye(first.shape[1], device=first.device), rig.model.blocks[0].qkv, first.clone()
    with rig.opt.perturbed(), torch.no_grad():
        noise = (layer(x) - layer.bias - layer.scaling * (layer.lora_B @ layer.lora_A).T).T - first
    rig.opt.restore()
    share = (noise.norm() / first.norm()).item()
    assert abs(share / 0.05 - 1) < 0.02, f"the noise is {share:.4f} of the weight, not 0.05"
    assert torch.equal(first, before), "the frozen weight was written"


def write(row: Row, device: torch.device) -> None:
    path = machine.folder(device) / "lora.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=8, help="of 128 tokens each")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device(args.device)
    batch = torch.randint(0, 1000, (args.sequences, 128), device=device)
    row = measure(args.width, args.depth, args.rank, batch, args.rounds)
    write(row, device)
    print(
        f"{row.depth} layers of width {row.width}, {row.tokens} tokens, {row.threads} threads: LoRA {row.plain_ms} ms, "
        f"Flat-LoRA {row.flat_ms} ms a step: {row.ratio} times (quartiles {row.ratio_low} to {row.ratio_high})"
    )
    extra = row.flat_peak_bytes - row.plain_peak_bytes
    largest = row.largest_bytes / 1e6
    print(
        f"peak {extra / 1e6:+.1f} MB beside LoRA's {row.plain_peak_bytes / 1e6:.0f} MB; largest weight {largest:.1f} MB"
    )
    print(f"{'meets' if row.ratio < BAR else 'misses'} the bar: less than {BAR} times")


if __name__ == "__main__":
    main()
