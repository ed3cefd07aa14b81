"""What was measured on a GPU, as rows of a CSV; and the bars, each with what it was measured at."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

OURS = ("cuda", "triton", "cpu")
NAN = float("nan")


@dataclass
class Row:
    """One measurement. Times in microseconds, rates in 10^9 bytes per second.

    ``measured``: a half-step, "pass", "step" (both halves) or "training step". ``mode``: "graph" (replayed), "plain" (events
    around calls that the host enqueues ahead), "idle" (the host's time from an idle device) or "profiler" (launches).
    ``cache``: "cold" where inputs that together exceed the second-level cache take turns. ``cpu_us``: the host's time for
    the same call. ``extra_bytes``: allocated beyond the copy of the weights and the state of the base.
    """

    measured: str
    method: str
    backend: str
    shape_set: str
    n_tensors: int
    n_params: int
    dtype: str
    grad_dtype: str
    mode: str
    cache: str
    p20_us: float = NAN
    p50_us: float = NAN
    p80_us: float = NAN
    cpu_us: float = NAN
    launches: float = NAN
    bytes: float = NAN
    gbps: float = NAN
    copy_gbps: float = NAN
    pct_copy: float = NAN
    max_err: float = NAN
    extra_bytes: float = NAN
    device: str = ""
    torch: str = ""
    triton: str = ""
    cuda: str = ""
    samkern: str = ""
    commit: str = ""
    time: str = ""

    @property
    def where(self) -> str:
        """The shape set, with its dtype if that is not the usual one."""
        return self.shape_set if self.dtype == "float32" else f"{self.shape_set} {self.dtype}"

    def line(self) -> str:
        """For the eye."""
        parts = [f"{self.measured:<14}{self.method:<16}{self.backend:<26}{self.where:<24}{self.mode:<6}"]
        parts.append(f"{self.p50_us:>11.1f} us" if self.p50_us == self.p50_us else " " * 14)
        parts.append(f"{self.cpu_us:>10.1f} us host" if self.cpu_us == self.cpu_us else "")
        parts.append(f"{self.pct_copy:>7.1f} % of copy" if self.pct_copy == self.pct_copy else "")
        parts.append(f"{self.launches:>4.0f} launches" if self.launches == self.launches else "")
        return "".join(parts)


def write(rows: Sequence[Row], path: Path) -> None:
    """Appends to a CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        for row in rows:
            values = {key: round(x, 3) if isinstance(x, float) else x for key, x in asdict(row).items()}
            writer.writerow({**values, "max_err": row.max_err})


# ---- bars


@dataclass(frozen=True)
class Verdict:
    """A bar at one measurement. ``met`` is None where nothing was measured."""

    bar: str
    what: str
    value: str
    met: bool | None

    def line(self) -> str:
        """For the eye."""
        verdict = "not measured" if self.met is None else "met" if self.met else "MISSED"
        return f"{self.bar:<38}{self.what:<58}{self.value:>10}  {verdict}"


def _share_of_copy(rows: Iterable[Row]) -> Iterable[Verdict]:
    for row in rows:
        if row.cache == "cold" and row.backend in OURS:
            what = f"{row.measured} {row.method}, {row.where}, {row.backend}"
            yield Verdict("at least 85 % of copy (stretch 92 %)", what, f"{row.pct_copy:.1f} %", row.pct_copy >= 85)


def _launches(rows: Iterable[Row]) -> Iterable[Verdict]:
    for row in rows:
        if row.launches == row.launches and row.backend in OURS:
            what = f"{row.measured} {row.method}, {row.where}, {row.backend}"
            yield Verdict("one launch per half-step", what, f"{row.launches:.0f}", row.launches == 1)


def _enqueue(rows: Iterable[Row]) -> Iterable[Verdict]:
    for row in rows:
        if row.mode == "idle" and row.backend in OURS:
            what = f"{row.measured} {row.method}, {row.n_tensors} tensors, {row.backend}"
            yield Verdict("host at most 20 us per half-step", what, f"{row.cpu_us:.1f} us", row.cpu_us <= 20)


def step_us(row: Row) -> float:
    """What a step takes in a row of steps: as long as the slower of host and device."""
    return max(row.p50_us, row.cpu_us)


def _against_peers(rows: Sequence[Row]) -> Iterable[Verdict]:
    steps = [row for row in rows if row.measured == "step"]
    for ours in (row for row in steps if row.backend in OURS):
        for peer in (row for row in steps if row.where == ours.where and row.backend not in OURS):
            ratio = step_us(peer) / step_us(ours)
            tiny = ours.n_tensors >= 2000 and peer.backend.startswith("foreach")
            bar = "tiny tensors: 5 x foreach" if tiny else "never slower than a peer"
            what = f"{peer.backend} over {ours.backend}, {ours.where}"
            yield Verdict(bar, what, f"{ratio:.2f} x", ratio >= (5 if tiny else 1))


def _memory(rows: Iterable[Row]) -> Iterable[Verdict]:
    for row in rows:
        if row.extra_bytes == row.extra_bytes and row.backend in OURS and row.n_params >= 1_000_000:
            size = {"float32": 4, "bfloat16": 2}[row.dtype] * row.n_params
            share = 100 * row.extra_bytes / size
            yield Verdict(
                "extra memory at most 1 % of w",
                f"{row.method}, {row.where}, {row.backend}",
                f"{share:.2f} %",
                share <= 1,
            )


def _masks(rows: Sequence[Row]) -> Iterable[Verdict]:
    perturbs = {(row.method, row.where, row.backend): row for row in rows if row.measured == "perturb"}
    for (method, where, backend), row in perturbs.items():
        dense = perturbs.get(("SAM dense", where, backend))
        if method == "SAM masked" and dense is not None:
            ratio = row.p50_us / dense.p50_us
            yield Verdict("masked perturb: dense and 5 %", f"{where}, {backend}", f"{ratio:.3f} x", ratio <= 1.05)
    selects = [row for row in rows if row.method == "topk_mask"]
    for row in (row for row in selects if row.backend in OURS):
        if row.n_params >= 10**8:
            ms = row.p50_us / 1e3 * 1e8 / row.n_params
            yield Verdict("1e8 scores selected in 0.6 ms", f"{row.where}, {row.backend}", f"{ms:.2f} ms", ms < 0.6)
        for peer in (peer for peer in selects if peer.where == row.where and peer.backend not in OURS):
            ratio = peer.p50_us / row.p50_us
            yield Verdict("selection: 20 x torch.topk", f"{row.where}, {row.backend}", f"{ratio:.1f} x", ratio >= 20)


PAIRS = {"SAM": 2.0, "LookSAM k=5": 1.2}  # forward-backward pairs of a step


def _training(rows: Sequence[Row]) -> Iterable[Verdict]:
    training = [row for row in rows if row.measured == "training step"]
    base = next((row for row in training if row.method == "SGD"), None)
    for row in training:
        if base is not None and row.method in PAIRS:
            ratio, pairs = row.p50_us / base.p50_us, PAIRS[row.method]
            bar = f"{row.method}: {pairs:.1f} x SGD, and 3 %"
            yield Verdict(bar, f"{row.where}, {row.backend}", f"{ratio:.3f} x", ratio <= 1.03 * pairs)


BARS = {
    "share of copy": _share_of_copy,
    "launches": _launches,
    "host time": _enqueue,
    "peers": _against_peers,
    "memory": _memory,
    "masks": _masks,
    "training": _training,
}


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """All bars at all that was measured; those that are missed come last, where they are seen."""
    found: list[Verdict] = []
    for name, bar in BARS.items():
        found += list(bar(rows)) or [Verdict(name, "", "", None)]
    return sorted(found, key=lambda verdict: (True, None, False).index(verdict.met))


def table(rows: Sequence[Row]) -> str:
    """The bars as text."""
    found = verdicts(rows)
    counts = [sum(verdict.met is met for verdict in found) for met in (True, False, None)]
    last = "{} bars met, {} missed, {} not measured".format(*counts)
    return "\n".join([*(verdict.line() for verdict in found), last])
