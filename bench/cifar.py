"""CIFAR-10 for the training study: JPEGs decoded once, then everything on the device that trains.

The file is an npz with the arrays

    jpeg     uint8 (bytes,)     JPEG files of 32 x 32 RGB images, one after another
    offset   int64 (n + 1,)     image i is jpeg[offset[i]:offset[i + 1]]
    label    uint8 (n,)         class of each image, 0 to 9
    is_test  bool (n,)          its split

Shuffling and augmentation depend on (seed, epoch) alone and are drawn on the CPU, so that every method, on any device,
sees the same batches.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .atomic_save import atomic_save

SIDE, PAD, N_CLASSES = 32, 4, 10
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of the training pixels, 0 to 255


class DataError(Exception):
    """The data file cannot be used. The text says which and why, in a sentence."""


@dataclass(frozen=True)
class Cifar:
    """Images (n, 32, 32, 3) uint8 and classes (n,) int64, on one device."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    # Kept beside the images: made anew for each batch, it would be a copy from the host that waits for the device.
    moments: Tensor = field(default_factory=lambda: torch.tensor([MEAN, STD]))

    def to(self, device: torch.device) -> Cifar:
        return Cifar(*(getattr(self, f.name).to(device) for f in fields(self)))

    def held_out(self, n: int) -> tuple[Cifar, Cifar]:
        """All but the last ``n`` training images, and those. The test images are with neither in the latter."""
        first = replace(self, train_x=self.train_x[:-n], train_y=self.train_y[:-n])
        last = replace(
            self, train_x=self.train_x[-n:], train_y=self.train_y[-n:], test_x=self.test_x[:0], test_y=self.test_y[:0]
        )
        return first, last

    def normalised(self, images: Tensor) -> Tensor:
        """Images (n, 32, 32, 3) uint8 as the net takes them: (n, 3, 32, 32) float32, channels last in memory."""
        mean, std = self.moments
        return ((images - mean) / std).permute(0, 3, 1, 2)


def load(path: Path | None, cache: Path, n_train: int) -> Cifar:
    """The first ``n_train`` training images and all test images, on the CPU; decoded images are kept in ``cache``.

    Raises:
        DataError: there is no such file, it is not as described above, or it has fewer training images.
    """
    if path is None:
        raise DataError("there is no data file: set SAMKERN_DATA or --data to the npz with CIFAR-10, or try --smoke")
    if not path.is_file():
        raise DataError(f"{path} does not exist: set SAMKERN_DATA or --data to the npz with CIFAR-10, or try --smoke")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cached = cache / f"{path.stem}-{key}.pt"
    if cached.exists():
        images, labels, is_test = torch.load(cached, weights_only=True)
    else:
        images, labels, is_test = decode(path)
        atomic_save((images, labels, is_test), cached)
    train_x, train_y = images[~is_test], labels[~is_test]
    if n_train > len(train_y):
        raise DataError(f"{path} has {len(train_y):,} training images, {n_train:,} were asked for")
    return Cifar(train_x[:n_train], train_y[:n_train], images[is_test], labels[is_test])


def decode(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """All images (n, 32, 32, 3) uint8, their labels int64, and which are test images; about 0.1 ms an image.

    Raises:
        DataError: the file is not as the module describes it, or Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise DataError("decoding CIFAR-10 needs Pillow: pip install pillow") from None

    try:
        with np.load(path) as arrays:
            jpeg, offset, label, is_test = (arrays[name] for name in ("jpeg", "offset", "label", "is_test"))
        n = len(label)
        if len(offset) != n + 1 or len(is_test) != n or (n and label.max() >= N_CLASSES):
            raise ValueError(f"{n} labels, {len(offset)} offsets, {len(is_test)} split marks, or a class above 9")
        images = np.empty((n, SIDE, SIDE, 3), np.uint8)

        def decode_run(first: int) -> None:
            for i in range(first, min(first + 1000, n)):
                image = np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())).convert("RGB"))
                if image.shape != images.shape[1:]:
                    raise ValueError(f"image {i} is {image.shape[1]} x {image.shape[0]}, expected {SIDE} x {SIDE}")
                images[i] = image

        with ThreadPoolExecutor() as pool:
            list(pool.map(decode_run, range(0, n, 1000)))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not the npz with CIFAR-10 that bench/cifar.py describes: {error}") from None
    return torch.from_numpy(images), torch.from_numpy(label.astype(np.int64)), torch.from_numpy(is_test.astype(bool))


def synthetic(n_train: int, n_test: int) -> Cifar:
    """Random images that need no file: a pattern per class under noise, which a few steps learn."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(256, (N_CLASSES, 4, 4, 3), generator=generator).repeat_interleave(8, 1)
    pattern = pattern.repeat_interleave(8, 2)
    y = torch.arange(n_train + n_test) % N_CLASSES
    noise = torch.randint(256, (len(y), SIDE, SIDE, 3), generator=generator)
    x = ((pattern[y] + noise) // 2).to(torch.uint8)
    return Cifar(x[:n_train], y[:n_train], x[n_train:], y[n_train:])


def draws(data: Cifar, batch: int, n_batches: int, seed: int, epoch: int) -> Tensor:
    """Which training images make up each batch (n_batches, batch) of a validation set in an epoch, on the device."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randint(len(data.train_y), (n_batches, batch), generator=generator).to(data.train_y.device)


def batches(data: Cifar, batch: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images of an epoch in random order, shifted by up to 4 pixels, half of them mirrored.

    All batches have ``batch`` images; what is left over has its turn in another epoch.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    device, n = data.train_y.device, len(data.train_y) // batch * batch
    order = torch.randperm(len(data.train_y), generator=generator)[:n].to(device)
    shift = torch.randint(2 * PAD + 1, (2, n, 1), generator=generator).to(device)
    mirrored = (torch.rand(n, 1, generator=generator) < 0.5).to(device)
    padded = functional.pad(data.train_x, (0, 0, PAD, PAD, PAD, PAD))
    side = torch.arange(SIDE, device=device)
    rows, columns = shift[0] + side, shift[1] + torch.where(mirrored, SIDE - 1 - side, side)
    for first in range(0, n, batch):
        part = slice(first, first + batch)
        images = padded[order[part, None, None], rows[part, :, None], columns[part, None, :]]
        yield data.normalised(images), data.train_y[order[part]]
