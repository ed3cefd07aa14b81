"""Training under DistributedDataParallel: 2 and 4 ranks, gloo on the CPU, one thread each.

``perturb_sync="global"`` is the training of one process on the whole batch, but for the rounding of sums over ranks;
``"local"`` is m-SAM with a part for each rank. Weights, decisions, caches, masks and statistics are bitwise the same on all
ranks.
SyncBatchNorm is not tested: it takes no tensors on the CPU.
"""

import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import samkern

from .distributed import (
    ADAM,
    OWN_STEP,
    Training,
    assert_close,
    assert_same_everywhere,
    differences,
    train,
    with_options,
)

# Method, its options, steps.
GLOBAL = {
    "SAM": ("SAM", {"rho": 0.1}, 50),
    "LookSAM": ("LookSAM", {"rho": 0.1, "k": 3}, 50),
    "SSAMF_sample": ("SSAMF", {"rho": 0.1, "refresh_interval": 7, "sample_losses": True}, 50),
    "SSAMF_batch": ("SSAMF", {"rho": 0.1, "refresh_interval": 7, "fisher": "batch", "fisher_every": 2}, 50),
    "ARSAM": ("ARSAM", {"rho": 0.1, "window": 10, "warmup_steps": 5}, 50),
    # Looks sample every module under DDP, as without components.
    "ARSAM_modules": ("ARSAM", {"rho": 0.1, "window": 5, "warmup_steps": 2, "components": "module"}, 12),
    "SAM_inf": ("SAM", {"rho": 0.01, "p": torch.inf}, 12),
    "SAMk": ("SAMk", {"rho": 0.1, "k": 3}, 12),
    "ASAM_element": ("ASAM", {"rho": 0.5}, 12),
    "ASAM_filter": ("ASAM", {"rho": 0.5, "mode": "filter"}, 12),
    "AESAM": ("AESAM", {"rho": 0.1, "total_steps": 12}, 12),
    "AELookSAM_R1": ("AELookSAM", {"rho": 0.1, "total_steps": 12, "rule": "R1", "k": 3}, 12),
    "AELookSAM_R3": ("AELookSAM", {"rho": 0.1, "total_steps": 12, "rule": "R3"}, 12),
    "RST": ("RST", {"rho": 0.1}, 12),
    "GRST": ("GRST", {"rho": 0.1}, 12),
    "SSAMD": ("SSAMD", {"rho": 0.1, "total_steps": 12, "refresh_interval": 3}, 12),
    "MSAM": ("MSAM", {"rho": 0.1}, 12),
    "LETSSAM": ("LETSSAM", {"rho": 0.1, "period": 2, "beta": 10.0}, 12),
    "LETSASAM_diag": ("LETSASAM", {"rho": 0.1, "period": 3, "beta": 1000.0, "hyper": "diag"}, 12),
    "LookLayerSAM": ("LookLayerSAM", {"rho": 0.05, "k": 3}, 12),
    "LookSAM_Adam": ("LookSAM", {"rho": 0.1, "k": 2, "scope": "tensor", "base": ADAM}, 12),
    "SAM_own_step": ("SAM", {"rho": 0.1, "base": OWN_STEP}, 12),
}


LOCAL = {
    "SAM": ("SAM", {"rho": 0.1}),
    "SAM_inf": ("SAM", {"rho": 0.01, "p": torch.inf}),
    "SAMk": ("SAMk", {"rho": 0.1, "k": 2}),
    "ASAM": ("ASAM", {"rho": 0.5, "mode": "filter"}),
    "RST": ("RST", {"rho": 0.1, "seed": 3}),
    "SSAMF": ("SSAMF", {"rho": 0.1, "refresh_interval": 3, "sample_losses": True}),
    "SAM_own_step": ("SAM", {"rho": 0.1, "base": OWN_STEP}),
    "SAM_clipped": ("SAM", {"rho": 0.1, "base": ADAM, "max_grad_norm": 0.1}),
}
each_sync = pytest.mark.parametrize("sync", ["global", "local"])


# ---- what it equals


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", GLOBAL)
def test_global_is_one_process_on_the_whole_batch(ranks, name, n):
    method, options, steps = GLOBAL[name]
    alone = train(steps, method, {**options, "components": None} if "components" in options else options)
    lefts = ranks.run(n, train, steps, method, options)
    assert_same_everywhere(lefts)
    assert_close(lefts[0], alone)
    assert lefts[0].decisions == alone.decisions
    assert lefts[0].evaluations == alone.evaluations
    assert not differences(lefts[0].masks, alone.masks)
    assert not lefts[0].drew  # from torch's generator
    if "period" in options:
        radius, wanted = (left.state["samkern"]["radius"]["rho"] for left in (lefts[0], alone))
        assert 0.01 < radius < 0.5
        assert abs(radius - 0.1) > 1e-3
        torch.testing.assert_close(radius, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", LOCAL)
def test_local_is_m_sam(ranks, name, n):
    """With two ranks bitwise: the sum of two numbers has no order."""
    alone = train(8, *LOCAL[name], parts=n)
    lefts = ranks.run(n, with_options, {"sync": "local"}, 8, *LOCAL[name])
    assert_same_everywhere(lefts)
    assert lefts[0].decisions == alone.decisions
    assert_close(lefts[0], alone)
    if n == 2:
        assert not differences(lefts[0].weights, alone.weights)
    everything = train(8, *LOCAL[name])
    assert not torch.allclose(lefts[0].weights, everything.weights, rtol=0, atol=1e-5)


def test_m_sam_on_every_rank(ranks):
    """Two parts on each of two ranks are four parts."""
    lefts = ranks.run(2, with_options, {"sync": "local", "parts": 2}, 6, "SAM", {"rho": 0.1})
    assert_same_everywhere(lefts)
    assert_close(lefts[0], train(6, "SAM", {"rho": 0.1}, parts=4))


@pytest.mark.parametrize(
    ("method", "options", "sync", "reductions"),
    [
        ("SAM", {}, "global", [2] * 6),
        ("SAM", {}, "local", [1] * 6),
        ("SAMk", {"k": 2}, "global", [2, 1] * 3),
        ("SAMk", {"k": 2}, "local", [1] * 6),
    ],
)
def test_local_saves_a_reduction_of_gradients(ranks, method, options, sync, reductions):
    lefts = ranks.run(2, with_options, {"sync": sync, "counts": True}, 6, method, options)
    assert [left.reductions for left in lefts] == [reductions] * 2


# ---- what decides


def scaled_by_rank(t, i, net):
    """Gradients of the ranks are not the same: as if their passes had been rounded otherwise, and much more so."""
    noise = torch.rand(2, generator=torch.Generator().manual_seed(100 * t + i))
    for p in net.parameters():
        p.grad *= 1 + noise[dist.get_rank()]


def apart(method, options, agrees):
    """Without a reduction, so that ranks that decide differently do not wait for each other."""
    training = Training(method, options, ddp=None, after_backward=scaled_by_rank)
    if not agrees:
        names = ["samkern.optim.loop", "samkern.optim.masking", "samkern.optim.radius"]
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(f"{name}.same_on_all_ranks", lambda x, model: x)
            return training.run(range(16))
    return training.run(range(16))


@pytest.mark.parametrize(
    ("method", "options", "what"),
    [
        ("AESAM", {"total_steps": 16, "lambda1": 0.0, "lambda2": 0.5}, "decisions"),
        ("AELookSAM", {"total_steps": 16, "rule": "R3", "lambda1": 0.0, "lambda2": 0.5}, "decisions"),
        ("ARSAM", {"window": 4, "warmup_steps": 4, "a1": 2.0}, "schedule"),
        ("SSAMD", {"total_steps": 16, "refresh_interval": 3}, "masks"),
        ("SSAMF", {"fisher": "batch", "fisher_every": 2, "refresh_interval": 3}, "masks"),
        ("LETSSAM", {"period": 2, "beta": 0.1}, "radius"),
    ],
)
def test_rank_0_decides_for_all(ranks, method, options, what):
    def decided(left):
        return {
            "decisions": left.decisions,
            "masks": left.masks,
            "schedule": left.state["samkern"].get("schedule"),
            "radius": left.state["samkern"].get("radius"),
        }[what]

    zero, one = ranks.run(2, apart, method, {"rho": 0.1, **options}, True)
    assert not differences(decided(zero), decided(one))
    zero, one = ranks.run(2, apart, method, {"rho": 0.1, **options}, False)
    assert differences(decided(zero), decided(one))  # nothing else makes them the same


# ---- data of the ranks


class Branches(nn.Module):
    """Which of two layers is used depends on the data; the third never is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x, use_b):
        return torch.tanh(self.b(x) if use_b else self.a(x))


def uneven(t, part):
    """6 samples and the first layer, or 2 samples and, in two of three steps, the second layer."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t)).split([6, 2])[part]
    return x, part == 1 and t % 3 > 0


def train_branches(sync, method, options):
    torch.manual_seed(0)
    net = Branches()
    model = DistributedDataParallel(net, find_unused_parameters=True) if dist.is_initialized() else net
    options = {"momentum": 0.9, "weight_decay": 0.01, "rho": 0.1, **options}
    opt = getattr(samkern, method)(
        model.parameters(), torch.optim.SGD, lr=0.1, model=model, perturb_sync=sync, **options
    )
    loss_of = lambda t, part: model(*uneven(t, part)).square().mean()  # noqa: E731

    def closure_of(t, parts):
        def closure():
            opt.zero_grad()
            loss = sum(loss_of(t, part) for part in parts) / len(parts)
            loss.backward()
            return loss.item()

        return closure

    for t in range(8):
        if dist.is_initialized():
            opt.step(closure_of(t, [dist.get_rank()]))
        elif sync == "local":
            opt.step([closure_of(t, [0]), closure_of(t, [1])])
        else:
            opt.step(closure_of(t, [0, 1]))
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize(
    ("sync", "method", "options"),
    [
        ("global", "SAM", {}),
        ("local", "SAM", {}),
        ("local", "SAMk", {"k": 2}),
        ("global", "LookSAM", {"k": 2}),
        ("global", "AESAM", {"total_steps": 8}),
        ("global", "SSAMD", {"total_steps": 8, "refresh_interval": 2}),
    ],
)
def test_ranks_with_other_data_sizes_and_unused_parameters(ranks, sync, method, options):
    zero, one = ranks.run(2, train_branches, sync, method, options)
    assert not differences(zero, one)
    for ours, wanted in zip(zero, train_branches(sync, method, options), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


@each_sync
def test_batch_norm_sees_each_batch_once(ranks, sync):
    """Its buffers are those of training without a second pass. With lr = 0 both trainings have the same weights."""
    still = {"rho": 0.1, "base": {"cls": torch.optim.SGD, "lr": 0.0}}
    lefts = ranks.run(2, with_options, {"sync": sync, "norm": True}, 5, "SAM", still)
    assert len(lefts[0].buffers) == 5
    assert not differences(lefts[0].buffers, lefts[1].buffers)
    plain = ranks.run(2, with_options, {"norm": True}, 5, "RST", {**still, "p": 0.0})
    assert not differences(lefts[0].buffers, plain[0].buffers)
    assert differences(lefts[0].buffers[0], lefts[0].buffers[1])


def in_a_group_of_two(sync, method, options):
    """Ranks 2 and 3 train; the others do something else meanwhile."""
    group = dist.new_group([2, 3])
    if dist.get_rank() < 2:
        return None
    return train(6, method, {"rho": 0.1, **options}, sync=sync, ddp={"process_group": group})


@pytest.mark.parametrize(
    ("sync", "method", "options"),
    [
        ("local", "SAM", {}),
        ("global", "AESAM", {"total_steps": 6}),
        ("global", "ARSAM", {"window": 3, "warmup_steps": 3}),
        ("global", "SSAMD", {"total_steps": 6, "refresh_interval": 2}),
        ("global", "LETSSAM", {"period": 2}),
    ],
)
def test_a_group_of_its_own_asks_no_other_rank(ranks, sync, method, options):
    nobody, nothing, zero, one = ranks.run(4, in_a_group_of_two, sync, method, options)
    assert nobody is nothing is None
    assert_same_everywhere([zero, one])
    two = ranks.run(2, with_options, {"sync": sync}, 6, method, {"rho": 0.1, **options})
    assert not differences(vars(zero), vars(two[0]))


# ---- ways to call it


@pytest.mark.parametrize(
    ("sync", "method", "options"),
    [
        ("local", "SAM", {}),
        ("local", "RST", {"seed": 3}),
        ("global", "LookSAM", {"k": 2}),
        ("global", "AESAM", {"total_steps": 6}),
        ("global", "MSAM", {}),
    ],
)
def test_without_a_closure(ranks, sync, method, options):
    closed = ranks.run(2, with_options, {"sync": sync, "counts": True}, 6, method, options)
    halves = ranks.run(2, with_options, {"sync": sync, "counts": True, "closed": False}, 6, method, options)
    assert not differences([vars(left) for left in closed], [vars(left) for left in halves])


@each_sync
@pytest.mark.parametrize("closed", [True, False], ids=["closure", "halves"])
def test_accumulation_without_reductions_but_the_last(ranks, sync, closed):
    how = {"sync": sync, "closed": closed, "counts": True}
    one_batch = ranks.run(2, with_options, how, 6, "SAM", {"rho": 0.1})
    micro = ranks.run(2, with_options, {**how, "micro": 2}, 6, "SAM", {"rho": 0.1})
    assert_same_everywhere(micro)
    assert_close(micro[0], one_batch[0])
    assert micro[0].reductions == one_batch[0].reductions


@pytest.mark.parametrize(
    ("sync", "method", "options"),
    [
        ("global", "SAM", {}),
        ("local", "SAM", {}),
        ("global", "LookSAM", {"k": 2}),
        ("global", "GRST", {"p": 0.7}),
        ("global", "ARSAM", {"window": 4, "warmup_steps": 4}),
        ("global", "SSAMF", {"fisher": "batch", "fisher_every": 1, "refresh_interval": 2}),
        ("global", "SSAMD", {"total_steps": 8, "refresh_interval": 2}),
        ("global", "LETSSAM", {"period": 2}),
        ("global", "LETSSAM", {"period": 2, "hyper": "diag"}),
        ("global", "MSAM", {}),
    ],
)
def test_gradients_may_be_views_of_buckets(ranks, sync, method, options):
    """The second backward of a step writes where the first gradients are."""
    options = {"rho": 0.1, **options}
    copies = ranks.run(2, with_options, {"sync": sync}, 8, method, options)
    views = ranks.run(2, with_options, {"sync": sync, "ddp": {"gradient_as_bucket_view": True}}, 8, method, options)
    assert not differences([vars(left) for left in copies], [vars(left) for left in views])


def test_parts_with_views_of_buckets(ranks):
    options = {"parts": 2}
    copies = ranks.run(2, with_options, options, 4, "GRST", {"p": 1.0})
    views = ranks.run(2, with_options, {**options, "ddp": {"gradient_as_bucket_view": True}}, 4, "GRST", {"p": 1.0})
    assert not differences([vars(left) for left in copies], [vars(left) for left in views])


@pytest.mark.parametrize("method", ["SAM", "LookSAM"])
def test_static_graph(ranks, method):
    dynamic = ranks.run(2, train, 6, method)
    static = ranks.run(2, with_options, {"ddp": {"static_graph": True}}, 6, method)
    assert not differences([vars(left) for left in dynamic], [vars(left) for left in static])


def resume(sync, method, options):
    """What rank 0 has saved after 5 steps is loaded on all ranks into others, for 5 more."""
    training = Training(method, options, sync=sync)
    training.run(range(5))
    saved = [None]
    if dist.get_rank() == 0:
        file = io.BytesIO()
        torch.save((training.model.state_dict(), training.opt.state_dict()), file)
        saved = [file.getvalue()]
    dist.broadcast_object_list(saved)
    other = Training(method, options, sync=sync)
    other.run(range(90, 93))
    for to, state in zip((other.model, other.opt), torch.load(io.BytesIO(saved[0]), weights_only=True), strict=True):
        to.load_state_dict(state)
    left, unbroken = other.run(range(5, 10)), training.run(range(5, 10))
    return left, differences((left.weights, left.state, left.masks), (unbroken.weights, unbroken.state, unbroken.masks))


@pytest.mark.parametrize(
    ("sync", "method", "options"),
    [
        ("local", "SAM", {}),
        ("local", "RST", {}),
        ("global", "LookSAM", {"k": 3}),
        ("global", "AELookSAM", {"total_steps": 10, "rule": "R3"}),
        ("global", "ARSAM", {"window": 4, "warmup_steps": 2}),
        ("global", "SSAMF", {"fisher": "batch", "fisher_every": 2, "refresh_interval": 3}),
        ("global", "LETSSAM", {"period": 2}),
    ],
)
def test_a_checkpoint_of_rank_0_continues_on_all(ranks, sync, method, options):
    (left, broken), (other, broken_there) = ranks.run(2, resume, sync, method, options)
    assert not broken
    assert not broken_there
    assert not differences(left.weights, other.weights)
