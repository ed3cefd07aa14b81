"""Checkpoints by ``torch.distributed.checkpoint``: saved on some ranks, resumed on as many or others, or by one process."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.utils._pytree import tree_map

import samkern
import samkern.integrations.dcp

from . import sharded
from .lists import BF16, FP32
from .sharded import Case

dcp = pytest.importorskip("torch.distributed.checkpoint", reason="this torch has no torch.distributed.checkpoint")

ADAMW = {"base": torch.optim.AdamW, "base_options": {"lr": 1e-2, "weight_decay": 0.1}}
FISHER = {"rho": 0.1, "fisher": "batch", "refresh_interval": 3, "fisher_every": 2}
CASES = {
    "LookSAM": Case(samkern.LookSAM, {"rho": 0.1, "k": 3}, dtypes=(FP32,), **ADAMW),
    "LookSAM_half": Case(samkern.LookSAM, {"rho": 0.1, "k": 3, "cache_dtype": BF16}, dtypes=(BF16,), **ADAMW),
    "ARSAM": Case(samkern.ARSAM, {"rho": 0.1, "window": 3, "warmup_steps": 1, "max_rate": 0.7}, dtypes=(FP32,)),
    "AESAM": Case(samkern.AESAM, {"rho": 0.1, "total_steps": 10}, dtypes=(FP32,)),
    "SSAMF": Case(samkern.SSAMF, FISHER, dtypes=(FP32,)),
    "RMSprop": Case(
        samkern.LookSAM,
        {"rho": 0.1, "k": 2},
        dtypes=(FP32,),
        base=torch.optim.RMSprop,
        base_options={"lr": 1e-3, "momentum": 0.9},
    ),
}
SAVED, END = 4, 10


def make(name, how):
    """``how`` None: in one process."""
    case = CASES[name]
    net = sharded.make_net(case.dtypes[0])
    if how is not None:
        sharded.sharded(net, how)
    return net, case.make(net.parameters(), model=net)


def train(net, opt, steps):
    for t in steps:
        opt.step(sharded.closure_for(net, t, opt))


def wholes(tree):
    return tree_map(lambda x: sharded.whole(x) if isinstance(x, torch.Tensor) else x, tree)


def everything(net, opt):
    """As whole tensors. Masks as entries, whatever the checkpoint has of them."""
    state = wholes(opt.state_dict())
    state["samkern"]["masks"] = [None if mask is None else sharded.whole(mask) for mask in opt.masks()]
    return [sharded.whole(p) for p in net.parameters()], state


def save_and_go_on(folder, names, how):
    """What was saved, and what became of it."""
    results = {}
    for name in names:
        net, opt = make(name, how)
        train(net, opt, range(SAVED))
        dcp.save({"model": net.state_dict(), "optimizer": opt.state_dict()}, checkpoint_id=f"{folder}/{name}")
        saved = everything(net, opt)
        train(net, opt, range(SAVED, END))
        results[name] = saved, everything(net, opt)
    return results


def load_and_go_on(folder, names, how):
    results = {}
    for name in names:
        net, opt = make(name, how)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(2)
        train(net, opt, range(20, 22))  # what is loaded replaces what is there
        weights = {"model": net.state_dict()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that one process is one process
            dcp.load(weights, checkpoint_id=f"{folder}/{name}")
        net.load_state_dict(weights["model"])
        samkern.integrations.dcp.load(opt, f"{folder}/{name}")
        loaded = everything(net, opt)
        train(net, opt, range(SAVED, END))
        results[name] = loaded, everything(net, opt)
    return results


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """On 4 ranks: the folder, what was saved, and the unbroken runs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (results, *_) = ranks.run(4, save_and_go_on, str(folder), list(CASES), "rows", timeout=200)
    return folder, results


def assert_continues(results, saved, bitwise):
    """``results``: of a rank; ``saved``: of one that has not stopped."""
    for name, (loaded, end) in results.items():
        assert same(loaded, saved[name][0]), name
        weights, unbroken = end[0], saved[name][1][0]
        if bitwise:
            assert same(end, saved[name][1]), name
        tolerance = 3e-2 if CASES[name].dtypes == (BF16,) else 2e-6
        for x, y in zip(weights, unbroken, strict=True):
            assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), name
        assert not all(map(torch.equal, weights, loaded[0])), name


@pytest.mark.parametrize(("n", "how"), [(4, "rows"), (2, "rows"), (4, "replicated"), (4, "tensor_parallel")])
def test_a_checkpoint_of_4_ranks_resumes(ranks, saved, n, how):
    """The state is that which was saved, bit by bit; on as many ranks in the same way so is all that follows."""
    folder, unbroken = saved
    for results in ranks.run(n, load_and_go_on, str(folder), list(CASES), how, timeout=200):
        assert_continues(results, unbroken, bitwise=(n, how) == (4, "rows"))


def test_a_checkpoint_of_4_ranks_resumes_in_one_process(saved):
    folder, unbroken = saved
    assert_continues(load_and_go_on(str(folder), list(CASES), None), unbroken, bitwise=False)


def test_a_checkpoint_of_one_process_resumes_on_2_ranks(ranks, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unbroken = save_and_go_on(str(tmp_path), ["LookSAM", "SSAMF"], None)
    for results in ranks.run(2, load_and_go_on, str(tmp_path), ["LookSAM", "SSAMF"], "rows", timeout=100):
        assert_continues(results, unbroken, bitwise=False)


# ---- other ways


def copies(name):
    """By state dicts, in memory and through a file of each rank; by deepcopy and pickle, with the parameters."""
    net = sharded.sharded(sharded.make_net(), "rows")
    opt = CASES[name].make(net.parameters())  # a net that is sharded is nothing that torch copies
    train(net, opt, range(SAVED))
    before, results = everything(net, opt), {}
    opt.zero_grad()  # torch cannot copy a sharded tensor with a gradient
    for how, other in {"pickle": pickle.loads(pickle.dumps(opt)), "deepcopy": copy.deepcopy(opt)}.items():
        results[how] = same(everything(net, other)[1], before[1])
        results[how + ", parameters"] = same([sharded.whole(p) for p in other.param_groups[0]["params"]], before[0])
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    whole = wholes(opt.state_dict())
    for how, state in {
        "memory": opt.state_dict(),
        "file": torch.load(file, weights_only=False),
        "whole": whole,
    }.items():
        twin, other = make(name, "rows")
        twin.load_state_dict(net.state_dict())
        other.load_state_dict(copy.deepcopy(state))
        results[how] = same(everything(twin, other), before)
        train(twin, other, range(SAVED, END))
        results[how + ", later"] = everything(twin, other)
    train(net, opt, range(SAVED, END))
    end = everything(net, opt)
    return {how: same(value, end) if "later" in how else value for how, value in results.items()}


@pytest.mark.parametrize("name", ["LookSAM", "SSAMF"])
def test_state_dicts_and_copies_of_sharded_optimizers(ranks, name):
    for results in ranks.run(2, copies, name, timeout=60):
        assert all(results.values()), results


def of_torch():
    """What torch's own functions for checkpoints make of it: the base's part, and the rates stay."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net, opt = make("LookSAM", "rows")
    train(net, opt, range(SAVED))
    state = get_optimizer_state_dict(net, opt)
    twin, other = make("LookSAM", "rows")
    before = [sharded.whole(p) for p in twin.parameters()]
    set_optimizer_state_dict(twin, other, state, options=StateDictOptions(strict=False))  # one is unused
    return {
        "state": same(wholes(other.base_state_dict()["state"]), wholes(opt.base_state_dict()["state"])),
        "weights": all(map(torch.equal, before, [sharded.whole(p) for p in twin.parameters()])),
        "rates": [group["lr"] for group in other.param_groups] == [1e-2],
        "fresh": other.steps == 0 and not other.own_state()["cache"],
        "names": set(state) == {"state", "param_groups"},
    }


def test_what_torch_takes_of_it_is_the_part_of_the_base(ranks):
    for results in ranks.run(2, of_torch, timeout=60):
        assert all(results.values()), results


def test_what_cannot_be_loaded_is_an_error_and_changes_nothing(tmp_path):
    w, v = torch.ones(3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    opt, other = (samkern.LookSAM([p], torch.optim.SGD, lr=0.1, momentum=0.9, k=2) for p in (w, v))
    for o, p in ((opt, w), (other, v)):
        o.step(lambda o=o, p=p: (o.zero_grad(), p.square().sum().backward()))
    dcp.save({"optimizer": opt.state_dict(), "model": {"w": w}}, checkpoint_id=tmp_path, no_dist=True)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="under 'opt'; it has model, optimizer"):
        samkern.integrations.dcp.load(other, tmp_path, key="opt")
    with pytest.raises(ValueError, match="belongs to other parameters"):
        samkern.integrations.dcp.load(other, tmp_path)
    assert same(other.state_dict(), before)
    v.sum().backward()
    other.first_step()
    with pytest.raises(RuntimeError, match="second_step"):
        samkern.integrations.dcp.load(other, tmp_path)
    other.restore()
