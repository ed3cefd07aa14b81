"""1,000 random configurations, each beside its oracle: method, base, groups, types, layouts, missing gradients, faults.

The same ones in every run; ``SAMKERN_FRESH=1`` draws others, and ``make soak`` does so for 20 minutes.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samkern.optim import budget, engine, keeper, loop, masking, perturbation

from .cases import draw_case
from .lists import affordable
from .trial import Trial

N_CASES = {"cpu": 850, "reference": 150}
N_EMULATED = {"cuda": 50, "triton": 3}  # where kernels for GPUs run on the CPU
FRESH = os.environ.get("SAMKERN_FRESH") == "1"


@st.composite
def random_cases(draw):
    return draw_case(lambda options: draw(st.sampled_from(options)))


def test_equal_their_oracles_and_survive_faults(backend):
    @settings(
        max_examples=N_CASES.get(backend) or affordable(backend, 200, N_EMULATED[backend]),
        derandomize=not FRESH,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(random_cases())
    def run(case):
        Trial(case, backend).run()

    run()


def a_thousandth_further(climb):
    return lambda self, group: climb(self, group)._replace(rho=1.001 * group["rho"])


def without(method):
    return lambda self, *args, **options: None


def without_caches(state_dict):
    return lambda self: {**state_dict(self), "cache": {}}


BROKEN = {
    "another radius": (perturbation.Euclidean, "climb", a_thousandth_further),
    "weights stay perturbed when a step fails": (keeper.PlanKeeper, "restore", without),
    "a schedule goes on when a step fails": (budget.Budget, "undo", without),
    "a mask goes on when a step fails": (masking.Masking, "undo", without),
    "a checkpoint forgets caches": (keeper.PlanKeeper, "state_dict", without_caches),
    "a checkpoint forgets counters": (engine.SharpnessAware, "load_own_state", without),
    "gradients stay restricted": (loop.StepLoop, "_finish", lambda _: lambda self: setattr(self, "_pending", None)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_noticed(what, monkeypatch):
    """Within 200 cases; the same 200 pass as it is."""
    owner, name, broken = BROKEN[what]
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    with pytest.raises((AssertionError, RuntimeError, ValueError, KeyError)):
        for number in range(200):
            Trial(draw_case(random.Random(number).choice), "cpu").run()
