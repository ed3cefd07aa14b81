"""The benchmarks run, refuse to time what is wrong, and count what they say. On a tiny shape set."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytorch_optimizer")

from bench import peers, shapes, test_half_steps, test_passes
from bench.harness import Candidate, Harness, stopwatch

TINY = shapes.ShapeSet("tiny", [(5, 3), (), (70,), (0,)], rounds=3, misaligned=True)
SOLID = shapes.ShapeSet("solid", [(5, 3), (7,), (70,)], rounds=3)


class FakeBenchmark:
    def pedantic(self, target, setup, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            setup()
            target()


def test_shape_sets():
    sizes = {s.name: (s.n_tensors, s.n_params) for s in shapes.ALL}
    assert sizes["ResNet-18"] == (62, 11_173_962)
    assert sizes["ViT-S/16"] == (152, 22_050_664)
    assert sizes["2,000 x 64"] == (2000, 128_000)
    assert sizes["one of 100M"] == (1, 100_000_000)
    ragged = next(s for s in shapes.ALL if s.name == "ragged")
    tensors = ragged.tensors(torch.empty)
    assert any(x.numel() == 0 for x in tensors)
    assert any(x.data_ptr() % 16 for x in tensors if x.numel())


def test_half_steps_are_checked_timed_and_counted(tmp_path, monkeypatch):
    harness = Harness()
    makers = test_half_steps.sam_steppers(shapes.ShapeSet("many", [(1,)] * 300, 1), harness)
    made = test_half_steps.rigs(SOLID, makers)
    errors = test_half_steps.checked(made, 2)
    candidates = [
        Candidate(rig.stepper.name, lambda rig=rig: rig.step(), error)
        for rig, error in zip(made[1:], errors[1:], strict=True)
    ]
    harness.compare(FakeBenchmark(), SOLID, "step", "SAM", candidates, 40)
    assert [row.backend for row in harness.rows] == [
        "cpu", "eager loop", "foreach + fused SGD", "pytorch_optimizer foreach", "pytorch_optimizer default",
    ]  # fmt: skip
    assert all(row.bytes == 40 * SOLID.n_params and row.p50_us > 0 and row.max_err < 1e-5 for row in harness.rows)
    assert "torch.compile was not measured on many" in harness.table()
    monkeypatch.setattr("bench.harness.RESULTS", tmp_path)
    path = harness.write()
    harness.write()
    lines = path.read_text().splitlines()
    assert lines[0].startswith("measured,method,backend")
    assert len(lines) == 1 + 2 * len(harness.rows)


def test_a_wrong_result_is_never_timed():
    class Wrong(peers.EagerLoop):
        name = "wrong"

        @torch.no_grad()
        def second(self):
            super().second()
            self.params[0].mul_(1.001)

    made = test_half_steps.rigs(SOLID, [lambda w: peers.Ours(w, backend="reference"), Wrong])
    with pytest.raises(AssertionError, match="wrong is off by"):
        test_half_steps.checked(made, 1)


def test_looksam_peers_agree():
    makers = [
        lambda w: peers.Ours(w, test_half_steps.samkern.LookSAM, k=peers.K, alpha=peers.ALPHA, backend="reference"),
        peers.ForeachLookSAM,
    ]
    made = test_half_steps.rigs(SOLID, makers)
    kept = [x.clone() for x in made[0].g]
    assert max(test_half_steps.checked_cycles(made, kept)) < 1e-4


@pytest.mark.parametrize("name", test_passes.PASSES)
def test_passes_agree(name):
    n_bytes, ours, plain, others = test_passes.PASSES[name]
    assert test_passes.check(ours, plain, TINY) < 1e-6
    assert n_bytes % 4 == 0
    lists = test_passes.Lists(SOLID)
    with torch.no_grad():
        for run in others.values():
            run(lists)


def test_the_stopwatch_only_runs_inside():
    before = stopwatch()
    sum(range(100_000))
    assert stopwatch() == before
    with stopwatch.running():
        sum(range(100_000))
    assert stopwatch() > before
