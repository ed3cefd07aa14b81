"""Under DistributedDataParallel: what fails on one rank or on all of them, and what ``perturb_sync="local"`` cannot be."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

import samkern

from .distributed import OWN_STEP, SGD, Training, assert_close, assert_same_everywhere, differences, train, with_options

each_sync = pytest.mark.parametrize("sync", ["global", "local"])


# ---- faults


class NanOnLastRank:
    """In pass ``i`` of step 3 the last rank's loss is NaN."""

    def __init__(self, i):
        self.i = i

    def __call__(self, t, i, loss):
        return loss * torch.nan if (t, i, dist.get_rank()) == (3, self.i, dist.get_world_size() - 1) else loss


@each_sync
@pytest.mark.parametrize("i", [0, 1], ids=["first_pass", "second_pass"])
@pytest.mark.parametrize("base", [SGD, OWN_STEP], ids=["fused", "own_step"])
def test_a_nan_on_one_rank_skips_the_step_on_all(ranks, sync, i, base):
    options = {"rho": 0.1, "base": base}
    lefts = ranks.run(2, with_options, {"sync": sync, "on_loss": NanOnLastRank(i)}, 6, "SAM", options)
    assert_same_everywhere(lefts)
    where = "at w was" if i == 0 else "at w + eps was"
    assert lefts[0].skips == 1
    assert lefts[0].reasons == [None] * 3 + [f"a gradient {where} not finite"] + [None] * 2
    without = Training("SAM", options, parts=2 if sync == "local" else 1).run([0, 1, 2, 4, 5])
    assert_close(lefts[0], without)


@pytest.mark.parametrize(
    ("sync", "method", "options"),
    [
        ("local", "SAMk", {"k": 2}),  # step 3 does not look
        ("global", "LookSAM", {"k": 2}),
        ("global", "AESAM", {"total_steps": 6}),
        ("global", "ARSAM", {"window": 3, "warmup_steps": 1}),
        ("global", "SSAMF", {"refresh_interval": 3, "fisher": "batch"}),
        ("global", "SSAMD", {"refresh_interval": 3, "total_steps": 6}),
        ("global", "MSAM", {}),
        ("global", "LETSSAM", {"period": 2}),
    ],
)
def test_a_nan_leaves_caches_and_statistics_the_same(ranks, sync, method, options):
    how = {"sync": sync, "on_loss": NanOnLastRank(0)}
    lefts = ranks.run(2, with_options, how, 6, method, {"rho": 0.1, **options})
    assert_same_everywhere(lefts)
    assert lefts[0].skips == 1
    assert lefts[0].weights.isfinite().all()


class FaultError(Exception):
    pass


def fails_once(sync, i, where, options):
    """The closure of step 2 raises in pass ``i``, before or after the backward, and is then called again."""

    def fail(t, passes, what):
        if (t, passes, failed) == (2, i, []):
            failed.append(t)
            raise FaultError
        return what

    failed, how = [], {"on_loss" if where == "before" else "after_backward": fail}
    training = Training("SAM", {"rho": 0.1}, sync=sync, ddp=options, **how)
    training.run(range(2))
    before = copy.deepcopy((list(training.net.parameters()), training.opt.state_dict()))
    with pytest.raises(FaultError):
        training.step(2)
    assert not differences(before, (list(training.net.parameters()), training.opt.state_dict()))
    assert training.model.require_backward_grad_sync
    return training.run(range(2, 6))


def never_fails(sync, sync_of_step_2):
    training = Training("SAM", {"rho": 0.1}, sync=sync)
    training.run(range(2))
    training.opt.perturb_sync = sync_of_step_2
    training.step(2)
    training.opt.perturb_sync = sync
    return training.run(range(3, 6)).weights


@each_sync
@pytest.mark.parametrize("i", [0, 1], ids=["first_pass", "second_pass"])
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=["copies", "views"])
def test_after_a_closure_that_raises_everywhere_training_goes_on(ranks, sync, i, where, options):
    lefts = ranks.run(2, fails_once, sync, i, where, options)
    assert_same_everywhere(lefts)
    # A forward without its backward: DDP reduces in the next backward, be it that of a pass that wants no reduction.
    reduces = "global" if (i, where) == (1, "before") else sync
    assert not differences(lefts[0].weights, ranks.run(2, never_fails, sync, reduces)[0])


def gradients_after_a_failure(view):
    training = Training("SAM", {"rho": 0.1}, ddp={"gradient_as_bucket_view": view})
    training.run(range(2))  # buckets have their final places after the first backward
    closure, grads = training.closure(2, 0), []

    def fails_after_backward():
        if grads:
            training.opt.zero_grad()
        loss = closure()
        if grads:
            raise FaultError
        grads.extend(p.grad.clone() for p in training.net.parameters())
        return loss

    with pytest.raises(FaultError):
        training.opt.step(fails_after_backward)
    return differences(grads, [p.grad for p in training.net.parameters()])


def test_first_gradients_are_put_back_from_buckets(ranks):
    assert ranks.run(2, gradients_after_a_failure, False) == [[], []]
    assert ranks.run(2, gradients_after_a_failure, True) == [[], []]


# ---- what cannot be


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("MSAM", {"momentum": 0.9}, "a perturbation before the only pass"),
        ("LookSAM", {}, "OrthogonalPart, which mixes both gradients"),
        ("GRST", {}, "Blend, which mixes both gradients"),
        ("ARSAM", {}, "Difference, which mixes both gradients"),
        ("AESAM", {"total_steps": 9}, "GradientNorm, which judges gradients"),
        ("SSAMD", {"total_steps": 9}, "DynamicMask, which is chosen by gradients"),
        ("SSAMF", {"fisher": "batch"}, "FisherMask, which is chosen by gradients"),
        ("LETSSAM", {}, "a LearnedRadius"),
    ],
)
def test_local_is_refused_where_ranks_would_drift_apart(method, options, reason):
    params = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=f"perturb_sync='local' does not go with {reason}.*use perturb_sync='global'"):
        getattr(samkern, method)(params, torch.optim.SGD, lr=0.1, perturb_sync="local", **options)


def test_what_perturb_sync_can_be():
    with pytest.raises(ValueError, match="perturb_sync must be"):
        samkern.SAM([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, perturb_sync="none")


def without_first_pass(method, options):
    """Each step without the line that is missing, and then with it."""
    training = Training(method, options, sync="local", counts=True)
    errors = []
    for t in range(4):
        try:
            training.closure(t, 0)()
            training.opt.first_step()
            training.opt.second_step()
        except RuntimeError as error:
            errors.append((t, str(error)))
            with training.opt.first_pass():
                training.closure(t, 0)()
            training.opt.first_step()
            training.opt.restore()  # gradients are as they were: again
            if training.opt.first_step():
                training.closure(t, 0)()
            training.opt.second_step()
    return errors


def test_a_first_pass_that_was_reduced_is_no_local_one(ranks):
    for errors in ranks.run(2, without_first_pass, "SAMk", {"k": 2}):
        assert [t for t, _ in errors] == [0, 2]
        assert all("with opt.first_pass():" in error for _, error in errors)


def refused(how, kind):
    """Errors of both ways to take a step; the weights stay, and the ranks are not out of step."""
    training = Training("SAM", sync="local", **how)
    if kind != "wrapped":
        training.opt.model = training.net if kind == "module" else None
    weights, errors = [p.detach().clone() for p in training.net.parameters()], []
    for closed in (True, False):
        training.closed = closed
        with pytest.raises(ValueError, match="perturb_sync='local'") as error:
            training.step(0)
        errors.append(str(error.value))
    assert not differences(weights, list(training.net.parameters()))
    training.opt.perturb_sync = "global"
    training.opt.model = training.model
    return errors, training.run(range(2)).weights


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({}, "module", "needs model=, the DistributedDataParallel .* got model=Sequential"),
        ({}, "none", "needs model=, the DistributedDataParallel .* got model=NoneType"),
        ({"ddp": {"static_graph": True}}, "wrapped", "static_graph=True.* use perturb_sync='global'"),
    ],
)
def test_local_is_refused_where_it_cannot_leave_out_a_reduction(ranks, how, kind, message):
    (errors, zero), (_, one) = ranks.run(2, refused, how, kind)
    assert all(re.search(message, error) for error in errors), errors
    assert not differences(zero, one)


def test_one_process_has_nothing_to_reduce(ranks):
    """Local is global, with a process group of one and without any."""
    alone, local = train(4, "SAM"), train(4, "SAM", sync="local")
    assert not differences(vars(alone), vars(local))
    for sync in ("global", "local"):
        (left,) = ranks.run(1, with_options, {"sync": sync}, 4, "SAM")
        assert not differences(alone.weights, left.weights)
