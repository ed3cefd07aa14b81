"""The parameter lists that are measured: what people train, and what is hard."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeSet:
    """``rounds``: how often everything is measured. ``misaligned``: every second tensor starts off a 16-byte border."""

    name: str
    shapes: list[Shape]
    rounds: int
    misaligned: bool = False

    @property
    def n_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def n_tensors(self) -> int:
        return len(self.shapes)

    def tensors(self, make: Callable[..., Tensor] = torch.randn) -> list[Tensor]:
        if not self.misaligned:
            return [make(shape) for shape in self.shapes]
        offsets = [i % 4 if i % 2 else 0 for i in range(len(self.shapes))]
        flat = [make(math.prod(shape) + offset) for shape, offset in zip(self.shapes, offsets, strict=True)]
        return [x[o:].view(shape) for x, o, shape in zip(flat, offsets, self.shapes, strict=True)]


def resnet18() -> list[Shape]:
    """ResNet-18 for 32 x 32 images: 62 tensors, 11.2 million parameters."""
    shapes: list[Shape] = [(64, 3, 3, 3), (64,), (64,)]
    width = 64
    for out in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if width != out:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (10, 512), (10,)]


def vit_s16() -> list[Shape]:
    """ViT-S/16: 152 tensors, 22.1 million parameters."""
    d = 384
    shapes: list[Shape] = [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,)]
    for _ in range(12):
        shapes += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [*shapes, (d,), (d,), (1000, d), (1000,)]


def ragged() -> list[Shape]:
    """All sizes side by side, empties among them."""
    return [
        (0,),
        (1,),
        (),
        (3, 0),
        (70_000,),
        (17, 31),
        (65_536,),
        (1_000_001,),
        (5,),
        (0, 7),
        (129, 257),
        (250_000, 4),
    ] * 4


ALL = [
    ShapeSet("ResNet-18", resnet18(), rounds=40),
    ShapeSet("ViT-S/16", vit_s16(), rounds=30),
    ShapeSet("2,000 x 64", [(64,)] * 2000, rounds=60),
    ShapeSet("one of 100M", [(100_000_000,)], rounds=6),
    ShapeSet("ragged", ragged(), rounds=40, misaligned=True),
]
