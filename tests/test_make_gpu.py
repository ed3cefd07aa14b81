"""What `make gpu` does, on a machine without a GPU: stages keep to their time, and its benchmark runs."""

from __future__ import annotations

import csv
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_half_steps, gpu_steps, gpu_whole_steps, peers, shapes, stages, test_passes
from bench.gpu_clock import Clock
from bench.gpu_rows import Row, table, verdicts
from bench.gpu_session import Case, OutOfTimeError, Session, check
from bench.stages import GRACE, SECONDS, Stage, allowance, last_lines, passed, run_all


def python(name, code, most=20.0, least=0.0, **options):
    return Stage(name, (sys.executable, "-c", code), most, least, **options)


# Ignores the interrupt, and so does its child, which writes where it can be found.
HANGS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid)  # is in the file before the kill, unbuffered
time.sleep(60)
"""
LEAVES_A_CHILD = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
"""


def gone(pid):
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_gone(pids, seconds=5.0):
    deadline = time.perf_counter() + seconds
    while not all(map(gone, pids)) and time.perf_counter() < deadline:
        time.sleep(0.02)
    return all(map(gone, pids))


def test_a_failing_stage_does_not_hide_the_next(tmp_path):
    rounds = [
        [python("fails", "print('why'); raise SystemExit(3)")],
        [Stage("no_file", ("/nowhere/program",), 1)],
        [Stage("lacks", ("no-such-program",), 1, needs="no-such-program")],
        [python("passes", "print('seen')"), python("beside", f"print('{SECONDS}')", most=7)],
    ]
    said = []
    endings = run_all(rounds, 60, tmp_path / "results", said.append)
    assert list(endings) == ["fails", "no_file", "lacks", "passes", "beside"]
    assert endings["fails"].startswith("failed with 3")
    assert endings["no_file"].startswith("failed to start")
    assert endings["lacks"] == "left out: no-such-program is not here"
    assert passed(endings["passes"])
    assert (tmp_path / "results" / "passes.txt").read_text() == "seen\n"
    assert (tmp_path / "results" / "beside.txt").read_text() == "7\n"  # its limit, as it was told
    assert (tmp_path / "results" / "summary.txt").read_text().splitlines() == said
    report = last_lines(rounds, endings, tmp_path / "results")
    assert "---- fails: failed with 3" in report
    assert "why" in report
    assert "seen" not in report


def test_a_hanging_stage_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 0.3)
    start = time.perf_counter()
    endings = run_all([[python("hangs", HANGS, most=2)], [python("next", "pass")]], 60, tmp_path, lambda line: None)
    assert endings["hangs"].startswith("stopped after 2 s")
    assert passed(endings["next"])
    assert time.perf_counter() - start < 15
    pids = (tmp_path / "hangs.txt").read_text().split()
    assert len(pids) == 2
    assert all_gone(pids)


def test_an_interrupted_stage_tells_what_it_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 50.0)  # before it would be killed, also on a busy machine
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    start = time.perf_counter()
    endings = run_all([[python("slow", code, most=2)]], 60, tmp_path, lambda line: None)
    assert endings["slow"].startswith("stopped")
    assert time.perf_counter() - start < 2 + stages.GRACE
    assert (tmp_path / "slow.txt").read_text() == "so far\n"


def test_children_that_a_stage_leaves_behind_end_with_it(tmp_path):
    assert passed(run_all([[python("leaves", LEAVES_A_CHILD)]], 60, tmp_path, lambda line: None)["leaves"])
    assert all_gone((tmp_path / "leaves.txt").read_text().split())


def test_whoever_stops_the_run_stops_its_stages(tmp_path):
    """An interrupt from outside reaches only the run itself: its stages have process groups of their own."""
    code = f"""
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where these tests run in the background
from bench.stages import Stage, run_all
run_all([[Stage("hangs", (sys.executable, "-c", {HANGS!r}), 60)]], 60, pathlib.Path({str(tmp_path)!r}), print)
"""
    pid = os.spawnl(os.P_NOWAIT, sys.executable, sys.executable, "-c", code)
    target = tmp_path / "hangs.txt"
    deadline = time.perf_counter() + 30
    while not (target.exists() and target.read_text().strip()) and time.perf_counter() < deadline:
        time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    assert all_gone(target.read_text().split())


def test_a_stage_in_place_of_another(tmp_path):
    def run(first):
        rounds = [[python("build", first)], [python("build-cpu", "pass", instead_of="build")], [python("last", "pass")]]
        return run_all(rounds, 60, tmp_path, lambda line: None)

    assert list(run("pass")) == ["build", "last"]
    assert list(run("raise SystemExit(1)")) == ["build", "build-cpu", "last"]


def test_later_stages_keep_their_time():
    rounds = [[Stage("a", (), 50, 10)], [Stage("b", (), 30, 20), Stage("c", (), 100, 5)], [Stage("d", (), 40, 15)]]
    assert allowance(rounds, 0, 1000) == [50]
    assert allowance(rounds, 1, 1000) == [30, 100]  # each its own limit
    assert allowance(rounds, 0, 60) == [60 - (20 + GRACE) - (15 + GRACE) - GRACE]
    assert allowance(rounds, 1, 60) == [30, 60 - (15 + GRACE) - GRACE]
    assert allowance(rounds, 2, 20) == [20 - GRACE]


def test_without_time_a_stage_is_left_out(tmp_path):
    endings = run_all([[python("first", "pass")], [python("last", "pass", least=10)]], 12, tmp_path, lambda line: None)
    assert endings["first"] == "left out: no time"
    assert passed(endings["last"])


def test_all_of_it_fits_into_nine_minutes():
    """However badly every stage behaves: each takes all it may, and its grace on top."""
    rounds, left = gpu.rounds("9.0", Path("results")), gpu.TOTAL
    for index, round_ in enumerate(rounds):
        limits = allowance(rounds, index, left)
        assert all(limit >= stage.least for limit, stage in zip(limits, round_, strict=True))
        left -= max(limits) + GRACE
    assert left >= 0
    assert gpu.TOTAL + GRACE < 9 * 60
    # Benchmarks have the machine to themselves.
    assert [stage.name for stages in rounds if any(s.name == "steps" for s in stages) for stage in stages] == ["steps"]


def test_what_runs_on_a_gpu():
    commands = {
        stage.name: " ".join(stage.command) for round_ in gpu.rounds("9.0", Path("results")) for stage in round_
    }
    assert {name for name in commands if name.startswith("sanitizer")} == {
        f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    }
    for round_ in gpu.rounds("9.0", Path("results")):
        for stage in round_:
            if stage.name.startswith("sanitizer"):
                assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert "bench.gpu_steps --seconds {seconds} --out results" in commands["steps"]
    assert SECONDS == "{seconds}"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="make gpu needs a GPU"):
        gpu.main([])


@pytest.mark.parametrize(("code", "status"), [("print('in vain'); raise SystemExit(4)", 1), ("print('bars')", 0)])
def test_the_summary_has_the_measurements_and_what_failed(code, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    stage = python("steps", code, shows=5)
    absent = Stage("absent", ("no-such-program",), 5, needs="no-such-program")
    monkeypatch.setattr(gpu, "rounds", lambda architecture, target: [[stage, absent]] if architecture == "9.0" else [])
    assert gpu.main(["--out", str(tmp_path)]) == status  # what is left out is no failure
    summary = (tmp_path / "summary.txt").read_text()
    assert ("in vain" if status else "bars") in summary
    assert "python -m bench.train --quick" in summary
    assert summary in capsys.readouterr().out + "\n"


# ---- its benchmark


def smoke(folder):
    return gpu_steps.main(["--device", "cpu", "--smoke", "--out", str(folder)])


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_benchmark_runs(tmp_path, capsys):
    """Every section on the CPU: a row per candidate, and a line per bar at the end."""
    assert smoke(tmp_path) == 0
    rows = rows_of(tmp_path / "steps.csv")
    assert list(rows[0]) == [field.name for field in fields(Row)]

    def measured(**wanted):
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

    n_halves = sum(len(method.halves) for method in gpu_half_steps.METHODS)
    for dtype in ("float32", "bfloat16"):
        cold = measured(cache="cold", dtype=dtype)
        assert len(cold) == n_halves + len(test_passes.PASSES)
        assert all(float(row["p50_us"]) > 0 and float(row["pct_copy"]) > 0 for row in cold)
        assert all(float(row["max_err"]) <= 2e-2 for row in cold)
    assert len(measured(mode="profiler")) == n_halves
    assert all(float(row["cpu_us"]) > 0 for row in measured(mode="idle"))
    assert {"cpu", "foreach + fused SGD", "eager loop"} <= {row["backend"] for row in measured(measured="step")}
    assert {row["method"] for row in measured(measured="training step")} == {"SGD", "SAM", "LookSAM k=5"}
    out = capsys.readouterr().out
    assert "failed" not in out
    assert out.splitlines()[-1].endswith("2 not measured")  # launches and memory, which only a GPU has
    assert smoke(tmp_path) == 0
    assert len(rows_of(tmp_path / "steps.csv")) == 2 * len(rows)


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    """A peer is left out. Ours fails the section, and hides nothing else."""

    def wrong(second):
        @torch.no_grad()
        def run(self):
            second(self)
            self.params[0].mul_(1.1)

        return run

    monkeypatch.setattr(peers.EagerLoop, "second", wrong(peers.EagerLoop.second))
    assert smoke(tmp_path / "peer") == 0
    assert "eager loop on smoke float32 is off by" in capsys.readouterr().out
    rows = rows_of(tmp_path / "peer" / "steps.csv")
    assert "foreach + fused SGD" in {row["backend"] for row in rows}
    assert "eager loop" not in {row["backend"] for row in rows}

    def update(rig):
        rig.feed(rig.g_s)
        rig.opt.second_step()
        if rig.opt._keeper.backend != "reference":
            rig.params[0].data.mul_(1.1)

    monkeypatch.setattr(gpu_half_steps.Rig, "update", update)
    assert smoke(tmp_path / "ours") == 1
    out = capsys.readouterr().out
    assert "failed: half-steps at the copy rate" in out
    assert "not timed" in out
    rows = rows_of(tmp_path / "ours" / "steps.csv")
    assert {row["measured"] for row in rows if row["cache"] == "cold"} == {"pass"}
    assert [row for row in rows if row["measured"] == "training step"]


def test_a_replay_that_does_nothing_is_not_timed(monkeypatch):
    """As one of a graph that has recorded nothing. Then the half-steps are measured as they are."""
    run = session()
    method = gpu_half_steps.METHODS[0]
    rigs = [gpu_half_steps.Rig(Case(gpu_steps.SMOKE), run.device, method, "cpu") for _ in range(2)]
    monkeypatch.setattr(run.clock, "graph", lambda halves: lambda: [half() for half in halves])
    replays = gpu_half_steps.recorded(run, rigs)
    assert list(replays) == ["perturb", "update"]
    monkeypatch.setattr(run.clock, "graph", lambda halves: halves[0])  # the second rig stays where it was
    with pytest.raises(RuntimeError, match="did nothing"):
        gpu_half_steps.recorded(run, rigs)
    assert gpu_half_steps.timers(run, Case(gpu_steps.SMOKE), method, "cpu")[0] == "plain"
    monkeypatch.setattr(run.clock, "graph", lambda halves: lambda: [half() for half in halves])
    assert gpu_half_steps.timers(run, Case(gpu_steps.SMOKE), method, "cpu")[0] == "graph"


def test_nan_is_wrong():
    with pytest.raises(AssertionError, match="off by inf"):
        check("ours", Case(gpu_steps.SMOKE), [torch.tensor([1.0, torch.nan])], [torch.ones(2)])


def test_without_time_the_bars_are_printed_all_the_same(tmp_path, capsys):
    assert gpu_steps.main(["--device", "cpu", "--smoke", "--seconds", "0", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "not measured for want of time: training" in out
    assert out.splitlines()[-1] == "0 bars met, 0 missed, 7 not measured"


def row(**facts):
    about = {"shape_set": "set", "n_tensors": 10, "n_params": 10**8, "dtype": "float32", "grad_dtype": "float32"}
    usual = {"measured": "step", "method": "SAM", "backend": "cuda", "mode": "plain", "cache": "warm"}
    return Row(**{**about, **usual, **facts})


BARS = {
    "copy": (
        [row(cache="cold", measured="update", pct_copy=85.0)],
        [row(cache="cold", measured="update", pct_copy=84.9)],
    ),
    "launches": ([row(measured="update", launches=1)], [row(measured="update", launches=2)]),
    "host": ([row(mode="idle", measured="update", cpu_us=20)], [row(mode="idle", measured="update", cpu_us=20.5)]),
    "peers": (
        [row(p50_us=10, cpu_us=5), row(p50_us=9, cpu_us=10, backend="eager loop")],  # the slower of device and host
        [row(p50_us=10, cpu_us=5), row(p50_us=9, cpu_us=9, backend="eager loop")],
    ),
    "tiny": (
        [row(p50_us=10, cpu_us=5, n_tensors=2000), row(p50_us=50, cpu_us=5, n_tensors=2000, backend="foreach chain")],
        [row(p50_us=10, cpu_us=5, n_tensors=2000), row(p50_us=49, cpu_us=5, n_tensors=2000, backend="foreach chain")],
    ),
    "memory": ([row(measured="update", extra_bytes=4e6)], [row(measured="update", extra_bytes=4.1e6)]),
    "masked": (
        [row(measured="perturb", method=f"SAM {m}", p50_us=t) for m, t in (("dense", 100), ("masked", 105))],
        [row(measured="perturb", method=f"SAM {m}", p50_us=t) for m, t in (("dense", 100), ("masked", 106))],
    ),
    "selection": (
        [row(measured="pass", method="topk_mask", p50_us=599)],
        [row(measured="pass", method="topk_mask", p50_us=600)],
    ),
    "torch.topk": (
        [
            row(measured="pass", method="topk_mask", n_params=9, p50_us=t, backend=b)
            for b, t in (("cuda", 10), ("torch.topk", 200))
        ],
        [
            row(measured="pass", method="topk_mask", n_params=9, p50_us=t, backend=b)
            for b, t in (("cuda", 10), ("torch.topk", 199))
        ],
    ),
    "training": (
        [row(measured="training step", method="SGD", p50_us=100), row(measured="training step", p50_us=206)],
        [row(measured="training step", method="SGD", p50_us=100), row(measured="training step", p50_us=207)],
    ),
    "LookSAM": (
        [row(measured="training step", method=m, p50_us=t) for m, t in (("SGD", 100), ("LookSAM k=5", 123))],
        [row(measured="training step", method=m, p50_us=t) for m, t in (("SGD", 100), ("LookSAM k=5", 124))],
    ),
}


@pytest.mark.parametrize("bar", BARS)
def test_bars(bar):
    """Just met, just missed; and the rows of peers are not held to them."""
    for rows, met in zip(BARS[bar], (True, False), strict=True):
        judged = [verdict for verdict in verdicts(rows) if verdict.met is not None]
        assert [verdict.met for verdict in judged] == [met], judged
        assert table(rows).endswith(f"{int(met)} bars met, {int(not met)} missed, 6 not measured")
    alone = [row(backend="foreach chain", cache="cold", pct_copy=10.0, launches=7, cpu_us=99.0)]
    assert all(verdict.met is None for verdict in verdicts(alone))


def test_missed_bars_come_last():
    lines = table([*BARS["copy"][1], *BARS["copy"][0]]).splitlines()
    assert [line.split()[-1] for line in lines[:1] + lines[-2:-1]] == ["met", "MISSED"]


def test_bytes_of_half_steps_and_passes():
    """In fp32 as the CPU's benchmarks count them, and the check of the second gradient where they leave it out."""
    halves = {method.name: {k: 4 * sum(v) for k, v in method.halves.items()} for method in gpu_half_steps.METHODS}
    assert halves["SAM SGD"] == {"perturb": 20, "update": 24}
    assert halves["SAM AdamW"] == {"update": 32}
    assert halves["LookSAM SGD"] == {"update": 56 - 20, "reuse": 28}
    assert halves["ASAM element"] == halves["ASAM filter"] == {"perturb": 24}
    assert {name: 4 * sum(n) for name, n in gpu_half_steps.OPERANDS.items()} == {
        name: n_bytes for name, (n_bytes, *_) in test_passes.PASSES.items()
    }
    assert Case(shapes.VIT_B, torch.bfloat16).bytes(4, 2) == (4 * 2 + 2 * 4) * shapes.VIT_B.n_params


def test_shape_sets_of_gpus():
    sizes = {s.name: (s.n_tensors, s.n_params) for s in shapes.ON_GPU}
    assert sizes["ResNet-50"] == (161, 25_557_032)
    assert sizes["ViT-B/16"] == (152, 86_567_656)
    assert sizes["GPT-2 medium"] == (292, 354_823_168)
    assert sizes["10,000 x 64"] == (10_000, 640_000)
    assert {s.name for s in shapes.ALL} <= set(sizes)


def session(seconds=100.0):
    return Session(torch.device("cpu"), time.perf_counter() + seconds, smoke=True)


def test_compiling_is_given_up(monkeypatch, capsys):
    """In time for what comes after it; whatever a compiler does with exceptions."""

    class Slow(peers.ForeachChain):
        name = "torch.compile"

        def first(self):
            try:
                time.sleep(30)
            except Exception as error:
                raise RuntimeError("wrapped") from error

    monkeypatch.setattr(peers, "Compiled", Slow)
    monkeypatch.setattr(gpu_whole_steps, "COMPILES", (gpu_steps.SMOKE.name,))
    monkeypatch.setattr(gpu_whole_steps, "COMPILE_SECONDS", 10.0)
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds, real=signal.setitimer: real(which, seconds / 20))
    start, run = time.perf_counter(), session()
    gpu_whole_steps.whole_steps(run, Case(gpu_steps.SMOKE), 0.1)
    assert time.perf_counter() - start < 10
    assert "torch.compile of smoke float32 was given up after 10 s" in capsys.readouterr().out
    assert "foreach + fused SGD" in {one.backend for one in run.rows}
    monkeypatch.setattr(peers, "Compiled", type("Quick", (peers.ForeachChain,), {"name": "torch.compile"}))
    gpu_whole_steps.whole_steps(run, Case(gpu_steps.SMOKE), 0.1)
    assert run.rows[-1].backend == "torch.compile"
    short = session(seconds=20)
    gpu_whole_steps.whole_steps(short, Case(gpu_steps.SMOKE), 0.1)
    assert "torch.compile of smoke float32 was left out: no time" in capsys.readouterr().out


def test_time_that_is_up_is_not_an_exception_that_somebody_swallows():
    assert not issubclass(OutOfTimeError, Exception)
    with pytest.raises(OutOfTimeError):
        session(seconds=1).require(2)


def test_the_clock_counts_calls():
    calls = []
    clock = Clock(torch.device("cpu"))
    assert clock.per_call([lambda: time.sleep(0.01)] * 3) == pytest.approx(0.01, rel=0.5)
    assert len(clock.enqueue(lambda: calls.append(1), 5)) == len(calls) == 5
    with pytest.raises(RuntimeError, match="graphs need a GPU"):
        clock.graph([])
