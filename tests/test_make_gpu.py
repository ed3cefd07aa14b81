"""What `make gpu` does, on a machine without a GPU: stages keep to their time, and its benchmark runs."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from bench import gpu, stages
from bench.stages import GRACE, SECONDS, Stage, allowance, last_lines, passed, run_all


def python(name, code, most=20.0, least=0.0, **options):
    return Stage(name, (sys.executable, "-c", code), most, least, **options)


# Ignores the interrupt, and so does its child, which writes where it can be found.
HANGS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(60)
"""
LEAVES_A_CHILD = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
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


def test_an_interrupted_stage_tells_what_it_knows(tmp_path):
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    start = time.perf_counter()
    endings = run_all([[python("slow", code, most=2)]], 60, tmp_path, lambda line: None)
    assert endings["slow"].startswith("stopped")
    assert time.perf_counter() - start < 2 + GRACE
    assert (tmp_path / "slow.txt").read_text() == "so far\n"


def test_children_that_a_stage_leaves_behind_end_with_it(tmp_path):
    assert passed(run_all([[python("leaves", LEAVES_A_CHILD)]], 60, tmp_path, lambda line: None)["leaves"])
    assert all_gone((tmp_path / "leaves.txt").read_text().split())


def test_whoever_stops_the_run_stops_its_stages(tmp_path):
    """An interrupt from outside reaches only the run itself: its stages have process groups of their own."""
    code = f"""
import pathlib, sys
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
    rounds, left = gpu.rounds("9.0"), gpu.TOTAL
    for index, round_ in enumerate(rounds):
        limits = allowance(rounds, index, left)
        assert all(limit >= stage.least for limit, stage in zip(limits, round_, strict=True))
        left -= max(limits) + GRACE
    assert left >= 0
    assert gpu.TOTAL + GRACE < 9 * 60
    # Benchmarks have the machine to themselves.
    assert [stage.name for stages in rounds if any(s.name == "steps" for s in stages) for stage in stages] == ["steps"]


def test_what_runs_on_a_gpu():
    commands = {stage.name: " ".join(stage.command) for round_ in gpu.rounds("9.0") for stage in round_}
    assert {name for name in commands if name.startswith("sanitizer")} == {
        f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    }
    for round_ in gpu.rounds("9.0"):
        for stage in round_:
            if stage.name.startswith("sanitizer"):
                assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert "bench.gpu_steps --seconds {seconds}" in commands["steps"]
    assert SECONDS == "{seconds}"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="make gpu needs a GPU"):
        gpu.main([])
