"""Masks over tensor lists, one bit an entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import mask_bytes, memory_order, pack_bits, unpack_bits


@dataclass(frozen=True, eq=False)
class BitMask:
    """Ones and zeros for every entry of a list of tensors, in an eighth of a byte each.

    ``bits``: uint8 of one dimension, on any device. The bits of each tensor begin at a multiple of 4 bytes, lowest bit
    first, its entries in row-major order; what is left of the last word is zero. ``shapes``: of the tensors.

    Raises:
        ValueError: ``bits`` does not fit the shapes.

    >>> mask = samkern.BitMask.pack([torch.tensor([True, False]), torch.tensor([[True], [True]])])
    >>> mask.count()
    3
    >>> mask.unpack()[0]
    tensor([ True, False])
    """

    bits: Tensor
    shapes: tuple[torch.Size, ...]

    def __post_init__(self) -> None:
        n_bytes = sum(mask_bytes(shape.numel()) for shape in self.shapes)
        if self.bits.dtype != torch.uint8 or self.bits.shape != (n_bytes,):
            raise ValueError(
                f"bits must be uint8 of shape ({n_bytes},) for these shapes, got {self.bits.dtype} {tuple(self.bits.shape)}"
            )

    @classmethod
    def zeros(cls, like: Sequence[Tensor]) -> BitMask:
        """All zeros, over tensors of the shapes and on the device of ``like``."""
        n_bytes = sum(mask_bytes(x.numel()) for x in like)
        device = like[0].device if like else None
        return cls(torch.zeros(n_bytes, dtype=torch.uint8, device=device), tuple(x.shape for x in like))

    @classmethod
    def ones(cls, like: Sequence[Tensor]) -> BitMask:
        """All ones."""
        shapes = tuple(x.shape for x in like)
        return cls(_ones(shapes, like[0].device if like else None), shapes)

    @classmethod
    def pack(cls, tensors: Sequence[Tensor]) -> BitMask:
        """From bool tensors."""
        parts = [pack_bits(x.flatten()) for x in tensors]
        bits = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
        return cls(bits, tuple(x.shape for x in tensors))

    def unpack(self) -> list[Tensor]:
        """Bool tensors of the shapes."""
        return [
            unpack_bits(part, shape.numel()).view(shape) for part, shape in zip(self.parts(), self.shapes, strict=True)
        ]

    def count(self) -> int:
        """The number of ones. Reads the device."""
        ones = torch.tensor([byte.bit_count() for byte in range(256)], device=self.bits.device)
        return int((torch.bincount(self.bits, minlength=256) * ones).sum())

    @property
    def numel(self) -> int:
        """Entries, ones and zeros."""
        return sum(shape.numel() for shape in self.shapes)

    def parts(self) -> list[Tensor]:
        """The bits of each tensor: parts of ``bits``, not copies."""
        return list(torch.split(self.bits, [mask_bytes(shape.numel()) for shape in self.shapes]))

    def inverted(self) -> BitMask:
        """Zeros for ones, and ones for zeros."""
        return BitMask(_ones(self.shapes, self.bits.device) ^ self.bits, self.shapes)

    def clone(self) -> BitMask:
        """A copy."""
        return BitMask(self.bits.clone(), self.shapes)

    def to(self, device: torch.device) -> BitMask:
        """The same on another device."""
        return BitMask(self.bits.to(device), self.shapes)

    def in_layout_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The bits of each tensor in the order of its memory: the same but for layouts that are not row-major."""
        return [
            part
            if x.is_contiguous()
            else pack_bits(unpack_bits(part, x.numel()).view(x.shape).permute(memory_order(x)).flatten())
            for part, x in zip(self.parts(), tensors, strict=True)
        ]


def _ones(shapes: Sequence[torch.Size], device: torch.device | None) -> Tensor:
    """The bits of all ones: zeros are left at the end of the last word of each tensor."""
    parts = [pack_bits(torch.ones(shape.numel(), dtype=torch.bool, device=device)) for shape in shapes]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=device)
