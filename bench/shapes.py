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


def resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet: 161 tensors, 25.6 million parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for inner, n_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(n_blocks):
            for out, n_in, size in ((inner, width, 1), (inner, inner, 3), (4 * inner, inner, 1)):
                shapes += [(out, n_in, size, size), (out,), (out,)]
            if block == 0:
                shapes += [(4 * inner, width, 1, 1), (4 * inner,), (4 * inner,)]
            width = 4 * inner
    return [*shapes, (1000, width), (1000,)]


def vit16(d: int) -> list[Shape]:
    """A ViT of 12 layers on 16 x 16 patches, 152 tensors: ViT-S has d = 384 and 22.1 million parameters, ViT-B 768, 86.6."""
    shapes: list[Shape] = [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,)]
    for _ in range(12):
        shapes += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [*shapes, (d,), (d,), (1000, d), (1000,)]


def gpt2_medium() -> list[Shape]:
    """GPT-2 medium: 292 tensors, 354.8 million parameters."""
    d = 1024
    shapes: list[Shape] = [(50257, d), (1024, d)]
    for _ in range(24):
        shapes += [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [*shapes, (d,), (d,)]


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


RESNET18 = ShapeSet("ResNet-18", resnet18(), rounds=40)
VIT_S = ShapeSet("ViT-S/16", vit16(384), rounds=30)
TINY = ShapeSet("2,000 x 64", [(64,)] * 2000, rounds=60)
LARGE = ShapeSet("one of 100M", [(100_000_000,)], rounds=6)
RAGGED = ShapeSet("ragged", ragged(), rounds=40, misaligned=True)
ALL = [RESNET18, VIT_S, TINY, LARGE, RAGGED]

# Those that are measured on GPUs only.
RESNET50 = ShapeSet("ResNet-50", resnet50(), rounds=30)
VIT_B = ShapeSet("ViT-B/16", vit16(768), rounds=20)
GPT2_MEDIUM = ShapeSet("GPT-2 medium", gpt2_medium(), rounds=10)
VERY_TINY = ShapeSet("10,000 x 64", [(64,)] * 10_000, rounds=30)
ON_GPU = [LARGE, VIT_B, RESNET50, RESNET18, TINY, GPT2_MEDIUM, VIT_S, VERY_TINY, RAGGED]  # by worth, if time is short
