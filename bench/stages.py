"""Commands in rounds, under one deadline.

Rounds follow each other, and the stages of a round run side by side. A stage that fails or hangs hides nothing: it gets no
more than its own limit, and no more than is left when the least that each later round needs is kept back. One that takes
longer is interrupted, so that pytest still tells what had failed, and soon after that killed with all its children.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 5.0  # seconds between the interrupt and the kill
SECONDS = "{seconds}"  # in a command: how long it may take here


@dataclass(frozen=True)
class Stage:
    """A command, and how long it may take: at ``most``, and at ``least`` if those before it run long, in seconds.

    ``needs``: a program without which it is left out. ``instead_of``: a stage in whose place it runs, if that did not pass.
    ``shows``: so many of its last lines belong into the summary, however it ended.
    """

    name: str
    command: tuple[str, ...]
    most: float
    least: float = 0
    needs: str = ""
    instead_of: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    shows: int = 0


Round = Sequence[Stage]


def allowance(rounds: Sequence[Round], index: int, left: float) -> list[float]:
    """Seconds for each stage of round ``index``, of ``left`` for it and all that come after it."""
    kept = sum(max(stage.least for stage in later) + GRACE for later in rounds[index + 1 :])
    return [min(stage.most, left - kept - GRACE) for stage in rounds[index]]


def _interruptible() -> None:
    """In a new process: what a shell runs in the background ignores interrupts, and hands that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """A stage under way, in a process group of its own. ``ending`` is empty until it has ended."""

    def __init__(self, stage: Stage, seconds: float, target: Path) -> None:
        self.stage, self.seconds, self.ending = stage, seconds, ""
        command = [part.replace(SECONDS, f"{seconds:.0f}") for part in stage.command]
        self._interrupted, self._start = False, time.perf_counter()
        with target.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_interruptible,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},  # what is killed has been written
            )

    def look(self) -> None:
        """Notes whether it has ended, and sees to it that it does in time."""
        spent, code = time.perf_counter() - self._start, self._process.poll()
        if code is not None:
            self._signal(signal.SIGKILL)  # children that it left behind
            how = "passed" if code == 0 else f"failed with {code}"
            self.ending = f"stopped after {spent:.0f} s" if self._interrupted else f"{how}, {spent:.0f} s"
        elif spent > self.seconds + GRACE:
            self._signal(signal.SIGKILL)
        elif spent > self.seconds and not self._interrupted:
            self._interrupted = True
            self._signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends it and its children now."""
        if not self.ending:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, which: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, which)


def run_round(stages: Round, seconds: Sequence[float], folder: Path) -> dict[str, str]:
    """Runs stages side by side and returns how each ended. Their output goes to ``<name>.txt`` in ``folder``."""
    endings: dict[str, str] = {}
    running: list[Running] = []
    try:
        for stage, limit in zip(stages, seconds, strict=True):
            if stage.needs and shutil.which(stage.needs) is None:
                endings[stage.name] = f"left out: {stage.needs} is not here"
            elif limit < 1:
                endings[stage.name] = "left out: no time"
            else:
                try:
                    running.append(Running(stage, limit, folder / f"{stage.name}.txt"))
                except OSError as error:
                    endings[stage.name] = f"failed to start: {error}"
        while not all(one.ending for one in running):
            for one in running:
                if not one.ending:
                    one.look()
            time.sleep(0.02)
    finally:
        for one in running:
            one.kill()
    endings.update({one.stage.name: one.ending for one in running})
    return {stage.name: endings[stage.name] for stage in stages}


def passed(ending: str) -> bool:
    """Whether a stage did what it should."""
    return ending.startswith("passed")


def run_all(rounds: Sequence[Round], seconds: float, folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Runs the rounds, says how every stage ended as soon as it is known, and keeps that in ``summary.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + seconds
    endings: dict[str, str] = {}
    for index, stages in enumerate(rounds):
        limits = allowance(rounds, index, deadline - time.perf_counter())
        wanted = [stage for stage in stages if not (stage.instead_of and passed(endings[stage.instead_of]))]
        limits = [limit for stage, limit in zip(stages, limits, strict=True) if stage in wanted]
        for name, ending in run_round(wanted, limits, folder).items():
            endings[name] = ending
            say(f"{name:<22}{ending}")
        lines = [f"{name:<22}{ending}" for name, ending in endings.items()]
        (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    return endings


def last_lines(rounds: Sequence[Round], endings: Mapping[str, str], folder: Path, of_failed: int = 15) -> str:
    """The ends of the outputs that somebody has to read: of what did not pass, and of stages that ask for it."""
    parts = []
    for stage in (stage for stages in rounds for stage in stages):
        path, ending = folder / f"{stage.name}.txt", endings.get(stage.name, "left out")
        if ending.startswith("left out") or not path.exists():
            continue
        n_lines = max(stage.shows, 0 if passed(ending) else of_failed)
        if n_lines:
            parts += [f"---- {stage.name}: {ending}", *path.read_text(errors="replace").splitlines()[-n_lines:], ""]
    return "\n".join(parts)
