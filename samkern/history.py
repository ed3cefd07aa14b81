"""A run on record: what every step did, in a CSV file or in TensorBoard, read from the device many steps at a time."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from .optim import Decision, SharpnessAware, StepRecord
from .optim.checks import at_least_int

__all__ = ["History"]

COLUMNS = (
    "step",
    "decision",
    "evaluations",
    "grad_norm",
    "second_norm",
    "perturb_norm",
    "radius",
    "rate",
    "skipped",
    "reason",
    "lr",
)

Row = Mapping[str, Any]


class ScalarWriter(Protocol):
    """What TensorBoard's ``SummaryWriter`` is to a ``History``."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> Any:
        """Notes one number."""


class History:
    """Writes what each step did, and numbers of your own, to a CSV file or to TensorBoard.

    ``record()`` after a step reads nothing from the device: numbers are kept there, and are read together every
    ``flush_every`` steps, by ``close()``, and when the block is left, by an exception too.

    Columns: ``step`` from 0; ``decision`` ("look", "reuse", "plain"); ``evaluations`` so far; ``grad_norm``, ``second_norm``
    and ``skipped`` with its ``reason`` as in ``opt.last_step``; ``perturb_norm``, which ``eps`` was divided by; ``radius``,
    the learned one or that of the first group; ``rate``, the schedule's own or the share of looks among recorded steps;
    ``lr`` of the first group; and what is passed to ``record()``. What a step has not is left empty.

    A CSV file that is there is continued if it has these columns. TensorBoard has ours as ``samkern/...``, a decision as 0
    (plain), 1 (reuse) or 2 (look), and no reasons.

    Args:
        optimizer: one of samkern's. It does not know of its ``History``, nor does a copy or a checkpoint of it.
        target: path of a CSV file; or an object with ``add_scalar(tag, value, step)``, such as
            ``torch.utils.tensorboard.SummaryWriter``, which is flushed but left open.
        flush_every: in steps, >= 1. What has not been flushed is lost if the process is killed.

    Steps that a CUDA graph replays are not seen. Under ``torch.distributed`` one rank should write.

    Raises:
        TypeError: ``optimizer`` or ``target`` is something else.
        ValueError: the file has other columns, or ``flush_every`` is out of range.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.LookSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=2)
    >>> with samkern.history.History(opt, "history.csv") as history:
    ...     for _ in range(3):
    ...         loss = model(torch.ones(4, 2)).square().mean()
    ...         loss.backward()
    ...         if opt.first_step():
    ...             model(torch.ones(4, 2)).square().mean().backward()
    ...         opt.second_step(zero_grad=True)
    ...         history.record(loss=loss)
    >>> import csv
    >>> with open("history.csv", newline="") as file:
    ...     [(row["step"], row["decision"], row["evaluations"]) for row in csv.DictReader(file)]
    [('0', 'look', '2'), ('1', 'reuse', '3'), ('2', 'look', '5')]
    """

    def __init__(
        self, optimizer: SharpnessAware, target: str | os.PathLike[str] | ScalarWriter, flush_every: int = 100
    ) -> None:
        if not isinstance(optimizer, SharpnessAware):
            raise TypeError(
                f"optimizer must be one of samkern's, got {type(optimizer).__name__}: wrap it, as in samkern.SAM(None, base)"
            )
        at_least_int("flush_every", flush_every, 1)
        self._optimizer, self._flush_every = optimizer, flush_every
        self._sink = _sink_for(target)
        self._steps, self._looks = self._sink.steps, self._sink.looks
        self._last: StepRecord | None = None
        self._pending: list[tuple[StepRecord, dict[str, Any]]] = []
        self._closed = False

    def record(self, /, **scalars: float | Tensor | None) -> None:
        """Notes the step that has just been taken, with numbers of your own: tensors of one entry stay on their device.

        In a CSV file the first record fixes the columns: pass None, or leave it out later, where there is no number.

        Raises:
            RuntimeError: no step has been taken since the last record, one is under way, or the history is closed.
            TypeError, ValueError: a scalar is none, or has no column.
        """
        step = self._step_to_record()
        kept = {name: _kept(name, value) for name, value in scalars.items()}
        self._sink.check(kept)
        self._steps, self._looks = self._steps + 1, self._looks + step.looked
        self._pending.append((step, {**self._state(step), **kept}))
        self._last = step
        if len(self._pending) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Reads the records since the last flush from the device, and writes them."""
        if self._pending:
            self._sink.write(_rows(self._pending))
            self._pending = []

    def close(self) -> None:
        """Flushes, and takes no further records."""
        if not self._closed:
            self.flush()
            self._closed = True

    def __enter__(self) -> History:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"samkern.history: the last {len(self._pending)} steps could not be written: {failure!r}")

    def _step_to_record(self) -> StepRecord:
        self._optimizer.require_idle("record()")
        step = self._optimizer.last_step
        if self._closed:
            raise RuntimeError("record() on a closed history: make another, which continues the file")
        if step is None:
            raise RuntimeError("record() before the first step: call it after opt.step() or opt.second_step()")
        if step is self._last:
            raise RuntimeError(
                f"record() twice for step {self._optimizer.steps - 1}: call it once after each opt.step() or opt.second_step()"
            )
        return step

    def _state(self, step: StepRecord) -> dict[str, Any]:
        """What the optimizer, not the record, knows of the step."""
        opt, group = self._optimizer, self._optimizer.param_groups[0]
        keeps = opt.reuse is not None and opt.reuse.keeps
        decision = Decision.PLAIN if step.reuses and not keeps else step.decision
        radius = opt.radius if opt.learned is not None else opt.options(group)[opt.perturbation.radius]
        rate = getattr(opt.schedule, "rate", None)
        return {
            "step": opt.steps - 1,
            "decision": decision.value,
            "evaluations": opt.evaluations,
            "radius": _kept("radius", radius),
            "rate": rate if isinstance(rate, Real) else self._looks / self._steps,
            "lr": _kept("lr", group.get("lr")),
        }


def _kept(name: str, value: Any) -> Any:
    """``value`` as it is now, where it is now."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().clone()  # a running sum may be added to before it is read
    if value is None or isinstance(value, Real):
        return _plain(value)
    got = f"a {value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"{name} must be a real number or tensor of one entry, got {got}: pass its mean, or one entry")


def _plain(value: Any) -> Any:
    """A number as an ``int`` or ``float`` (booleans and NumPy's too), anything else as it is."""
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _rows(pending: Sequence[tuple[StepRecord, Mapping[str, Any]]]) -> Sequence[Row]:
    """Everything there is to write, on the host."""
    tensors = [step.report for step, _ in pending]
    tensors += [value for _, values in pending for value in values.values() if isinstance(value, Tensor)]
    on_host = iter(_on_host(tensors))
    steps = [replace(step, report=next(on_host)) for step, _ in pending]
    rows = []
    for step, (_, values) in zip(steps, pending, strict=True):
        read = {k: _plain(next(on_host).item()) if isinstance(value, Tensor) else value for k, value in values.items()}
        rows.append({**dict.fromkeys(COLUMNS), **read, **_of_record(step)})
    return rows


def _of_record(step: StepRecord) -> dict[str, Any]:
    norms = {name: getattr(step, name) for name in ("grad_norm", "second_norm", "perturb_norm")}
    reason = step.reason
    return {
        **{name: None if norm is None else norm.item() for name, norm in norms.items()},
        "skipped": int(reason is not None),
        "reason": reason,
    }


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host, by one transfer for all that are alike."""
    alike = defaultdict(list)
    for i, x in enumerate(tensors):
        alike[x.device, x.dtype, x.shape].append(i)
    copies = list(tensors)
    for places in alike.values():
        together = torch.stack([tensors[i] for i in places]).cpu()
        for i, x in zip(places, together.unbind(), strict=True):
            copies[i] = x
    return copies


class _Sink:
    steps = looks = 0  # that it has already

    def check(self, scalars: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if one of them could not be written."""
        for name in scalars:
            if name in COLUMNS:
                raise ValueError(f"{name} is a column that samkern fills: give yours another name")

    def write(self, rows: Sequence[Row]) -> None:
        raise NotImplementedError


class _Board(_Sink):
    LEVELS = {"plain": 0, "reuse": 1, "look": 2}

    def __init__(self, writer: ScalarWriter) -> None:
        self.writer = writer

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            numbers = {**row, "decision": self.LEVELS[row["decision"]], "reason": None}
            step = numbers.pop("step")
            for name, value in numbers.items():
                if value is not None:
                    self.writer.add_scalar(f"samkern/{name}" if name in COLUMNS else name, float(value), step)
        getattr(self.writer, "flush", lambda: None)()


class _Table(_Sink):
    """A CSV file. Its columns are those that it has, or else those of the first record."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.extras: tuple[str, ...] | None = None
        with self.path.open("a+b") as file:  # a place that cannot be written to is told now
            file.seek(0)
            content = file.read()
            if content:
                end = content.rfind(b"\n") + 1
                self._continue(content[:end].decode(errors="replace"))
                file.truncate(end)  # a row that a crash has cut short

    def _continue(self, text: str) -> None:
        rows = csv.reader(io.StringIO(text))
        columns = next(rows, [])
        if tuple(columns[: len(COLUMNS)]) != COLUMNS:
            raise ValueError(
                f"target {str(self.path)!r} has the columns {', '.join(columns) or 'of no CSV file'}, not those of a history "
                f"({', '.join(COLUMNS)}): give another path"
            )
        self.extras = tuple(columns[len(COLUMNS) :])
        for row in rows:
            self.steps, self.looks = self.steps + 1, self.looks + (row[1:2] == [Decision.LOOK.value])

    def check(self, scalars: Mapping[str, Any]) -> None:
        super().check(scalars)
        if self.extras is None:
            self.extras = tuple(scalars)
        for name in scalars:
            if name not in self.extras:
                known = ", ".join(self.extras) or "none"
                raise ValueError(
                    f"{name} has no column in {str(self.path)!r}, whose scalars are: {known}. Pass it from the first record on "
                    "(None where there is no number), or give another path"
                )

    def write(self, rows: Sequence[Row]) -> None:
        columns = (*COLUMNS, *(self.extras or ()))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            text = io.StringIO()
            table = csv.DictWriter(text, columns, lineterminator="\n")
            if file.tell() == 0:
                table.writeheader()
            table.writerows(rows)
            file.write(text.getvalue())


def _sink_for(target: Any) -> _Sink:
    if isinstance(target, (str, os.PathLike)):
        return _Table(Path(target))
    if callable(getattr(target, "add_scalar", None)):
        return _Board(target)
    raise TypeError(
        f"target must be a path or have add_scalar(tag, value, step), got {type(target).__name__}: pass the path of a CSV file "
        "or a torch.utils.tensorboard.SummaryWriter"
    )
