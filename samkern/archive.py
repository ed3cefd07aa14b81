"""Logits of earlier epochs, by sample: a ring of slots in memory, or in a file that survives the process."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_HEADER = 4096  # bytes of a file before its data


class _Coming(NamedTuple):
    """Logits on their way from a GPU to pinned memory."""

    arrived: torch.cuda.Event
    epoch: int
    samples: Tensor
    logits: Tensor


class LogitArchive:
    """What a model has answered to each sample in the last ``lag + 1`` epochs.

    Of a sample's answers in one epoch the first counts: the second pass of a SAM step, at perturbed weights, changes nothing.
    Logits that are NaN or infinite, of a step that is skipped, are not kept.

    Args:
        n_samples, n_classes: of the data set.
        lag: how many epochs back logits are read, >= 1.
        dtype: float32, float16 or bfloat16, in which they are kept; beyond the range of float16 they are clamped.
        path: of a file that is mapped into memory, made if there is none. It may be shared by the processes of one machine,
            and continues where it was. None: plain memory.
        max_bytes: refuses to take more; None: no limit. ``n_bytes`` tells how many it takes.

    Raises:
        ValueError: an argument is out of range, it would take more than ``max_bytes``, or the file is of another archive.

    >>> archive = samkern.LogitArchive(n_samples=4, n_classes=2, lag=1)
    >>> archive.write(epoch=0, index=torch.tensor([3, 1]), logits=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> archive.read(epoch=0, index=torch.tensor([1, 0]))
    (tensor([[3., 4.],
            [0., 0.]]), tensor([ True, False]))
    """

    def __init__(
        self,
        n_samples: int,
        n_classes: int,
        lag: int = 3,
        *,
        dtype: torch.dtype = torch.float32,
        path: str | os.PathLike[str] | None = None,
        max_bytes: int | None = None,
    ) -> None:
        for name, value in (("n_samples", n_samples), ("n_classes", n_classes), ("lag", lag)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.n_samples, self.n_classes, self.lag, self.dtype = n_samples, n_classes, lag, dtype
        self.path = None if path is None else os.fspath(path)
        if max_bytes is not None and self.n_bytes > max_bytes:
            raise ValueError(
                f"max_bytes={max_bytes:,}, and {lag + 1} epochs of {n_samples:,} samples and {n_classes:,} classes in {dtype} "
                f"take {self.n_bytes:,}: use dtype=torch.float16, a smaller lag, a path= on disk, or MESALoss, which keeps none"
            )
        self._coming: deque[_Coming] = deque()
        self._map()

    @property
    def n_bytes(self) -> int:
        """What it takes, in memory or on disk."""
        return _HEADER + self._tag_bytes + (self.lag + 1) * self.n_samples * self.n_classes * self.dtype.itemsize

    @property
    def _tag_bytes(self) -> int:
        return -(-(self.lag + 1) * self.n_samples * 4 // _HEADER) * _HEADER

    def write(self, epoch: int, index: Tensor, logits: Tensor) -> None:
        """Keeps the logits of the samples that have none of this epoch yet, in place of those of ``epoch - lag - 1``.

        From a GPU they are copied while it goes on; the next call picks them up.

        Args:
            epoch: >= 0.
            index: which samples, integers of shape (B,), best on the CPU, where they are needed.
            logits: of shape (B, n_classes).

        Raises:
            ValueError: shapes do not fit, or an index is out of range; nothing was written.
        """
        index = self._checked(epoch, index)
        if logits.shape != (len(index), self.n_classes):
            raise ValueError(
                f"logits must be of shape ({len(index)}, {self.n_classes}), one row for each index, got {tuple(logits.shape)}"
            )
        kept = logits.detach()
        if self.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            kept = torch.where(kept.isinf(), kept, kept.clamp(-largest, largest))
        kept = kept.to(self.dtype)
        if kept.device.type != "cuda":
            self._collect(block=True)
            self._keep(epoch, index, kept.cpu())
            return
        here = torch.empty(kept.shape, dtype=self.dtype, pin_memory=True)
        here.copy_(kept, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(kept.device))
        self._coming.append(_Coming(arrived, epoch, index, here))
        self._collect(block=False)

    def read(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the samples in that epoch, float32 on the CPU, and which of them are there; zeros for the others."""
        index = self._checked(epoch, index)
        self._collect(block=True)
        slot = epoch % (self.lag + 1)
        there = self._tags[slot, index] == epoch + 1
        return torch.where(there[:, None], self._logits[slot, index].float(), 0.0), there

    def filled(self, epoch: int) -> int:
        """How many samples have logits of that epoch."""
        self._collect(block=True)
        return int((self._tags[epoch % (self.lag + 1)] == epoch + 1).sum())

    def flush(self) -> None:
        """Waits for copies that are under way."""
        self._collect(block=True)

    def state_dict(self) -> dict[str, Any]:
        """What it holds; of a file its description only, for the data are in it."""
        self.flush()
        state: dict[str, Any] = {"description": self._description()}
        if self.path is None:
            state |= {"tags": self._tags.clone(), "logits": self._logits.clone()}
        return state

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` unless ``state`` is of an archive like this one."""
        if state["description"] != self._description() or (self.path is None and "tags" not in state):
            raise ValueError(
                f"the checkpoint is of another archive: {state['description']}, expected {self._description()}, "
                f"{'in memory' if self.path is None else 'in a file'}"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes ``state_dict`` back. A file has its data already, perhaps of later epochs,
        whose logits are not taken for those of earlier ones.

        Raises:
            ValueError: it is of another archive; nothing has been loaded.
        """
        self.check_state_dict(state)
        self.flush()
        if self.path is None:
            self._tags.copy_(state["tags"])
            self._logits.copy_(state["logits"])

    # ---- pickle and deepcopy: a file is mapped again

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        state = dict(self.__dict__)
        if self.path is not None:
            for name in ("_tags", "_logits"):
                del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self._map()

    # ---- memory

    def _description(self) -> dict[str, Any]:
        sizes = {"n_samples": self.n_samples, "n_classes": self.n_classes, "lag": self.lag}
        return {"format": "samkern logits 1", **sizes, "dtype": DTYPES[self.dtype]}

    def _map(self) -> None:
        """Tags are epochs + 1, 0 for none: so a file tells by itself what it has, however the last process ended."""
        slots = self.lag + 1
        if self.path is None:
            self._tags = torch.zeros(slots, self.n_samples, dtype=torch.int32)
            self._logits = torch.zeros(slots, self.n_samples, self.n_classes, dtype=self.dtype)
            return
        header = json.dumps(self._description()).encode().ljust(_HEADER, b"\0")
        if os.path.exists(self.path) and os.path.getsize(self.path) > 0:
            with open(self.path, "rb") as file:
                found = file.read(_HEADER)
            # Zeros: of a process that ended before it wrote the header.
            if os.path.getsize(self.path) != self.n_bytes or (found.strip(b"\0") and found != header):
                described = found.rstrip(b"\0").decode(errors="replace")[:200]
                raise ValueError(
                    f"path={self.path!r} is the file of something else, {described!r}: delete it, or choose another path"
                )
        memory = torch.from_file(self.path, shared=True, size=self.n_bytes, dtype=torch.uint8)
        memory[:_HEADER] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        tags, logits = torch.split(memory[_HEADER:], [self._tag_bytes, self.n_bytes - _HEADER - self._tag_bytes])
        self._tags = tags[: slots * self.n_samples * 4].view(torch.int32).view(slots, self.n_samples)
        self._logits = logits.view(self.dtype).view(slots, self.n_samples, self.n_classes)

    def _checked(self, epoch: int, index: Tensor) -> Tensor:
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch must be an integer >= 0, got {epoch!r}")
        if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
            raise ValueError(
                f"index must be integers of shape (B,), the places of the samples in the data set, got {got}"
            )
        index = index.cpu().long()
        if len(index) > 0 and not (int(index.min()) >= 0 and int(index.max()) < self.n_samples):
            raise ValueError(
                f"index must be from 0 to {self.n_samples - 1}, got {int(index.min())} to {int(index.max())}: n_samples is "
                "that of the whole data set"
            )
        return index

    def _keep(self, epoch: int, index: Tensor, logits: Tensor) -> None:
        slot = epoch % (self.lag + 1)
        new = (self._tags[slot, index] != epoch + 1) & logits.isfinite().all(1)
        if not new.all():
            index, logits = index[new], logits[new]
        samples, of_sample = torch.unique(index, return_inverse=True)
        if len(samples) < len(index):
            places = torch.arange(len(index))
            first = torch.empty_like(samples).scatter_reduce_(0, of_sample, places, "amin", include_self=False)
            index, logits = samples, logits[first]
        self._tags[slot, index] = 0  # while they are written, they are nobody's
        self._logits[slot, index] = logits
        self._tags[slot, index] = epoch + 1

    def _collect(self, block: bool) -> None:
        while self._coming:
            arrived, epoch, samples, logits = self._coming[0]
            if block:
                arrived.synchronize()
            elif not arrived.query():  # type: ignore[no-untyped-call]
                return
            self._coming.popleft()
            self._keep(epoch, samples, logits)
