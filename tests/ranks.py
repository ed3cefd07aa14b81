"""Processes of a distributed training for tests: started once, and given a function to run on every rank.

``ranks.run(2, train, "local")`` (a fixture) runs ``train("local")`` on two ranks, each in a process of its own with one thread
and a fresh gloo process group, and returns what they returned, by rank. ``train`` stands at the top of a module; arguments and
results are pickled. A rank that raises, dies or hangs is a ``RankError`` with the tracebacks of all ranks.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in the process that all others are forked from: there is one of it, whoever asks first.
PRELOADED = [
    "tests.killed",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "samkern",
    "pytest",
    __name__,
]
START = 120.0  # seconds
GRACE = 5.0  # seconds that ranks have to end by themselves after another one has failed


class RankError(AssertionError):
    """What went wrong on which rank, the first one first."""


class Ranks:
    """A pool of ranks. Processes start when they are first wanted, and again after a failure; they end with this one."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._store: dist.TCPStore | None = None
        self._runs = 0

    def run(self, n_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Returns ``function(*args)`` of ranks ``0 .. n_ranks - 1``, which ``torch.distributed`` knows as all there are.

        ``timeout``: seconds for all of it. A collective that waits for longer than half of that raises on its rank.
        """
        if self._store is None:  # the port is a free one
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        if not all(rank.process.is_alive() for rank in self._ranks):
            self.close()
        new = [_Rank() for _ in range(n_ranks - len(self._ranks))]
        self._ranks += new
        for rank in new:
            rank.await_start()
        self._runs += 1
        ranks = self._ranks[:n_ranks]
        group = (self._store.port, f"run {self._runs}", n_ranks, timeout / 2)
        for i, rank in enumerate(ranks):
            rank.connection.send_bytes(pickle.dumps((function, args, i, *group)))
        results, errors = _collect(ranks, time.monotonic() + timeout)
        if errors:
            self.close()
            what = "\n".join(f"rank {i} of {n_ranks}: {error}" for i, error in errors.items())
            raise RankError(f"{function.__name__}{args}: {what}")
        return [results[i] for i in range(n_ranks)]

    def close(self) -> None:
        """Ends the processes. The next run starts others."""
        for rank in self._ranks:
            rank.end()
        self._ranks.clear()


class _Rank:
    """A process that runs what it is sent."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.connection, theirs = context.Pipe()
        self.stacks = tempfile.NamedTemporaryFile("r", prefix="samkern-rank-")  # noqa: SIM115
        self.process = context.Process(target=_serve, args=(theirs, self.stacks.name), daemon=True)
        self.process.start()
        theirs.close()

    def await_start(self) -> None:
        """The first process waits for the imports."""
        if not self.connection.poll(START) or self.connection.recv_bytes() != b"ready":
            raise RankError(f"a rank has not started in {START} seconds")

    def traceback(self) -> str:
        """Where its threads are now."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
        return self.stacks.read()

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.stacks.close()


def _collect(ranks: list[_Rank], deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    """What each rank returned, or what went wrong there, in the order in which it did."""
    results, errors = {}, {}
    waiting = {rank.connection: i for i, rank in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            errors.update({i: f"no result in time\n{ranks[i].traceback()}" for i in waiting.values()})
            break
        for connection in ready:
            i = waiting.pop(connection)
            try:
                returned, value = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                ranks[i].process.join(1)
                returned, value = False, f"ended with code {ranks[i].process.exitcode}\n{ranks[i].traceback()}"
            (results if returned else errors)[i] = value
        if errors:
            deadline = min(deadline, time.monotonic() + GRACE)
    return results, errors


# ---- in the process of a rank


def _serve(connection: Connection, stacks: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        store = None
        connection.send_bytes(b"ready")
        while True:
            try:
                function, args, rank, port, prefix, n_ranks, timeout = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                return
            try:
                if store is None:
                    store = dist.TCPStore("127.0.0.1", port, is_master=False)
                seconds = datetime.timedelta(seconds=timeout)
                run_store = dist.PrefixStore(prefix, store)
                dist.init_process_group("gloo", store=run_store, rank=rank, world_size=n_ranks, timeout=seconds)
                answer = pickle.dumps((True, _run(function, args)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)  # before the group: others may hang in it
            if dist.is_initialized():
                dist.destroy_process_group()


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    return function(*args)


def _end_with_parent() -> None:
    """A collective that hangs would outlive the tests."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
