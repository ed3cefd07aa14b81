"""Checkpoints, copies, groups: what is saved continues bit-exactly, and moves to and from the plain base optimizer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import samkern

from .lists import FP32, same_bits, same_tree, sums_error
from .methods import BASES, MOMENTUM, SAM, base_named, each_base, each_method, method_named
from .problems import closure_for, flat, make_net, through_a_file, train, weights


@each_method
@each_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [3, 4], ids=["before_a_look", "within_a_window"])
def test_resume_is_bit_exact(method, base, dtype, at, backend):
    """4 + 4 steps through a file equal 8, in weights and in everything that is kept."""
    net = make_net(dtype)
    opt = method.make(net.parameters(), base, backend=backend)
    train(net, opt, range(at), dtype)
    model_file, opt_file = through_a_file(net.state_dict()), through_a_file(opt.state_dict())
    resumed_net = make_net(dtype, seed=5)
    resumed = method.make(resumed_net.parameters(), base, backend=backend)
    train(resumed_net, resumed, range(2), dtype)  # what is loaded replaces what is there
    resumed_net.load_state_dict(model_file)
    resumed.load_state_dict(opt_file)
    train(net, opt, range(at, 8), dtype)
    train(resumed_net, resumed, range(at, 8), dtype)
    assert same_bits(weights(net), weights(resumed_net))
    assert opt.evaluations == resumed.evaluations
    a, b = opt.state_dict(), resumed.state_dict()
    assert torch.equal(a["samkern"]["cache_norm"], b["samkern"]["cache_norm"])
    for i, state in a["state"].items():
        assert all(torch.equal(value, b["state"][i][key]) for key, value in state.items())


@each_base
def test_half_precision_parameters_keep_float32_state(base, backend):
    """torch's own loading would cast it to bf16. A foreign base has what torch gives it."""
    net = make_net(torch.bfloat16)
    opt = method_named("LookSAM").make(net.parameters(), base, backend=backend)
    train(net, opt, range(4), torch.bfloat16)
    opt.load_state_dict(through_a_file(opt.state_dict()))
    expected = torch.bfloat16 if base.name == "own_step" else torch.float32
    assert {v.dtype for state in opt.state.values() for v in state.values()} <= {expected, torch.float32}
    assert any(v.dtype == expected for state in opt.state.values() for v in state.values()) or base.name == "SGD"
    assert {cache.dtype for cache in opt.state_dict()["samkern"]["cache"].values()} == {torch.float32}


def test_bf16_cache(backend):
    """Half the memory, and what is reused is what was stored: the correction has the length alpha norm(g)."""
    net = make_net(torch.float32)
    opt = method_named("LookSAM").make(net.parameters(), MOMENTUM, backend=backend, cache_dtype=torch.bfloat16)
    train(net, opt, range(4), torch.float32)
    ours = opt.state_dict()["samkern"]
    assert {cache.dtype for cache in ours["cache"].values()} == {torch.bfloat16}
    stored = torch.cat([cache.double().flatten() for cache in ours["cache"].values()]).norm()
    assert ours["cache_norm"][-1].item() == pytest.approx(stored.item(), rel=sums_error(backend, FP32))
    exact = make_net(torch.float32)
    train(exact, method_named("LookSAM").make(exact.parameters(), MOMENTUM, backend=backend), range(4), torch.float32)
    assert 0 < (flat(net) - flat(exact)).norm() < 1e-2 * flat(exact).norm()


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize("direction", ["to_the_base", "from_the_base"])
def test_checkpoints_move_to_and_from_the_plain_base(base, direction, backend):
    """With rho = 0 both do the same steps, so that a run can change hands in the middle."""
    net, twin = make_net(), make_net()
    opt = SAM.make(net.parameters(), base, rho=0.0, backend=backend)
    plain = base.cls(twin.parameters(), **base.options)
    source, target = ((net, opt), (twin, plain)) if direction == "to_the_base" else ((twin, plain), (net, opt))
    train(*source, range(5))
    target[0].load_state_dict(copy.deepcopy(source[0].state_dict()))
    target[1].load_state_dict(copy.deepcopy(source[1].state_dict()))
    train(*source, range(5, 10))
    train(*target, range(5, 10))
    assert (flat(net) - flat(twin)).norm() < 1e-13 * flat(net).norm()
    if direction == "from_the_base":
        assert opt.param_groups[0]["rho"] == 0.0  # not in the plain checkpoint; it stays
        assert opt.evaluations == 10


def test_checkpoint_keys_are_torchs():
    """Frameworks look for exactly these."""
    net = make_net()
    opt = method_named("LookSAM").make(net.parameters(), base_named("Adam"))
    train(net, opt, range(2))
    state_dict = opt.state_dict()
    assert set(state_dict) == {"state", "param_groups", "samkern"}
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in state_dict["state"].values())
    assert set(state_dict["samkern"]) == {
        "version",
        "t",
        "evaluations",
        "schedule",
        "reuse",
        "skips",
        "cache",
        "cache_norm",
        "masks",
        "squares",
    }


@pytest.mark.parametrize("what", ["groups", "sizes", "cache", "format"])
def test_a_checkpoint_of_other_parameters_is_refused_and_nothing_is_lost(what, backend):
    net = make_net()
    opt = method_named("LookSAM").make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(2))
    before = through_a_file(opt.state_dict())
    bad = copy.deepcopy(before)
    if what == "groups":
        bad["param_groups"].append(bad["param_groups"][0])
    elif what == "sizes":
        bad["param_groups"][0]["params"].pop()
    elif what == "cache":
        bad["samkern"]["cache"][0] = torch.ones(17)
    else:
        bad["samkern"]["version"] = 99
    with pytest.raises(ValueError, match=r"different number|doesn't match|other parameters|format 99"):
        opt.load_state_dict(bad)
    after = through_a_file(opt.state_dict())
    assert str(before) == str(after)
    train(net, opt, range(2, 4))


def test_loading_does_not_share_memory_with_the_checkpoint(backend):
    net = make_net()
    opt = method_named("LookSAM").make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(2))
    checkpoint = opt.state_dict()
    twin = make_net()
    other = method_named("LookSAM").make(twin.parameters(), MOMENTUM, backend=backend)
    other.load_state_dict(checkpoint)
    kept = copy.deepcopy(other.state_dict())
    train(net, opt, range(2, 6))
    now = other.state_dict()
    assert all(torch.equal(now["state"][i]["momentum_buffer"], s["momentum_buffer"]) for i, s in kept["state"].items())
    assert all(torch.equal(now["samkern"]["cache"][i], c) for i, c in kept["samkern"]["cache"].items())


def test_state_dict_hooks(backend):
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend)
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda o, s: {**s, "mine": 1})
    opt.register_load_state_dict_pre_hook(lambda o, s: seen.append(s.pop("mine")))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", 1, "loaded"]


@each_method
@each_base
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_continue_bit_exactly(method, base, how, backend):
    net = make_net()
    opt = method.make(net.parameters(), base, backend=backend, model=net)
    train(net, opt, range(4))
    pair = (net, opt)
    twin, other = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    assert other.model is twin
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    train(net, opt, range(4, 8))
    train(twin, other, range(4, 8))
    assert same_bits(weights(net), weights(twin))


@pytest.mark.parametrize(
    ("name", "holder", "missing"),
    [
        ("SSAMF_batch", "_masking", "_new_squares"),
        ("ARSAM", "reuse", "_component_then"),
        ("SAM", None, "perturb_sync"),
        ("SAM", None, "keep_gradients"),
    ],
)
def test_a_pickle_of_an_earlier_version(name, holder, missing, backend):
    """It lacks an attribute."""
    net = make_net()
    opt = method_named(name).make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(3))
    twin, other = copy.deepcopy((net, opt))
    part = other if holder is None else getattr(other, holder)
    pickled = dict(part.__reduce_ex__(2)[2])
    del pickled[missing]
    vars(part).clear()
    part.__setstate__(pickled)
    other.restore()
    assert same_tree(opt.state_dict(), other.state_dict())
    train(net, opt, range(3, 9))
    train(twin, other, range(3, 9))
    assert same_bits(weights(net), weights(twin))


def test_copies_with_a_scheduler_attached(backend):
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    train(net, opt, range(2))
    scheduler.step()
    twin, other = copy.deepcopy((net, opt))
    train(net, opt, range(2, 4))
    train(twin, other, range(2, 4))
    assert same_bits(weights(net), weights(twin))


# ---- param groups


def test_groups_are_shared_with_the_base():
    net = make_net()
    opt = SAM.make(net.parameters(), MOMENTUM)
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    assert opt.base_optimizer is opt.base
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is opt.base.param_groups
    opt.param_groups[0]["rho"] = 0.3
    assert "rho = 0.3" in opt.explain()
    assert "rho: 0.3" in repr(opt)


def test_a_group_added_later(backend):
    """It takes the defaults, is perturbed from its first gradient on, and equals having been there before."""
    net, twin = make_net(), make_net()
    early = method_named("LookSAM").make(
        [{"params": twin.conv.parameters()}, {"params": twin.head.parameters()}], MOMENTUM
    )
    late = method_named("LookSAM").make(net.conv.parameters(), MOMENTUM, backend=backend)
    late.add_param_group({"params": net.head.parameters(), "weight_decay": 0.5})
    early.param_groups[1]["weight_decay"] = 0.5
    assert late.param_groups[1]["rho"] == late.param_groups[0]["rho"]
    train(net, late, range(5))
    train(twin, early, range(5))
    assert torch.allclose(flat(net), flat(twin), rtol=1e-13)
    late.add_param_group({"params": net.conv2.parameters(), "rho": 0.0, "alpha": 0.1})
    before = weights(net)
    train(net, late, range(5, 8))
    assert not same_bits(weights(net.conv2), weights(twin.conv2))
    assert not same_bits(weights(net), before)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rho": -1.0}, r"group 1: rho must be a finite number >= 0, got -1.0"),
        ({"alpha": float("nan")}, r"group 1: alpha must be"),
        ({"k": 3}, r"group 1 sets k, which is one for all groups"),
        ({"gamma_max": 8.0}, r"group 1 sets gamma_max, which is one for all groups"),
        ({"components": "tensor"}, r"group 1 sets components, which is"),
        ({"rho_max": 2.0}, r"group 1 sets rho_max, which is"),
        ({"p": 3}, r"group 1: p must be one of 2, inf, got 3"),
    ],
)
def test_bad_groups_are_refused_and_not_added(group, message, backend):
    net = make_net()
    opt = method_named("LookSAM").make(net.conv.parameters(), MOMENTUM, backend=backend)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": net.head.parameters(), **group})
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match=message):
        opt = method_named("LookSAM").make(
            [{"params": net.conv.parameters()}, {"params": net.head.parameters(), **group}], MOMENTUM
        )


def test_adaptive_false_reproduces_the_authors_rule(backend):
    """Their code has T = 1 on whatever is not called "weight"."""
    import copy as copying

    from .oracles.bases import Sgd
    from .oracles.sam import ASAM

    net = make_net()
    twin = copying.deepcopy(net)
    named = list(net.named_parameters())
    groups = [
        {"params": [p for name, p in named if "weight" in name]},
        {"params": [p for name, p in named if "weight" not in name], "adaptive": False},
    ]
    opt = samkern.ASAM(groups, torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
    w = list(twin.parameters())
    adaptive = ["weight" in name for name, _ in named]
    oracle = ASAM(w, Sgd(w, lr=0.1), rho=0.5, adaptive=adaptive)
    for t in range(5):
        opt.step(closure_for(net, t, opt.zero_grad))
        oracle.step(closure_for(twin, t, lambda: None))
    assert (flat(net) - flat(twin)).norm() < 1e-12 * flat(net).norm()


@pytest.mark.parametrize(
    ("base", "options", "ours"),
    [(torch.optim.Adadelta, {"rho": 0.9}, "sam_rho"), (torch.optim.RMSprop, {"alpha": 0.99}, "sam_alpha")],
)
def test_names_that_the_base_uses_for_something_else(base, options, ours, backend):
    """rho is Adadelta's decay, alpha RMSprop's: those keep their values, ours are called sam_rho and sam_alpha in groups."""
    net = make_net()
    opt = samkern.LookSAM(net.parameters(), base, 0.05, alpha=0.7, lr=0.1, k=2, backend=backend)
    name, value = next(iter(options.items()))
    assert opt.param_groups[0][name] == value
    assert opt.param_groups[0][ours] == {"sam_rho": 0.05, "sam_alpha": 0.7}[ours]
    train(net, opt, range(3))
    opt.load_state_dict(through_a_file(opt.state_dict()))
    assert opt.param_groups[0][name] == value


def test_a_ready_base(backend):
    """It keeps its groups, options and state; params may be the same ones or None."""
    net, twin = make_net(), make_net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    other_base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    train(net, base, range(3))
    train(twin, other_base, range(3))
    opt = samkern.SAM(net.parameters(), base, backend=backend)
    other = samkern.SAM(None, other_base, backend=backend)
    assert opt.base is base
    train(net, opt, range(3, 6))
    train(twin, other, range(3, 6))
    assert same_bits(weights(net), weights(twin))
    with pytest.raises(TypeError, match=r"options \['lr'\] came with a ready SGD"):
        samkern.SAM(net.parameters(), base, lr=0.1)
    with pytest.raises(ValueError, match="params are not those of the given SGD"):
        samkern.SAM(twin.parameters(), base)


def test_state_that_is_replaced_by_hand(backend):
    """Cleared, or a buffer exchanged: the next step uses what is there."""
    p, q = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = samkern.SAM([p], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.0, backend=backend)
    plain = torch.optim.SGD([q], lr=0.1, momentum=0.9)

    def step_both():
        opt.step(lambda: setattr(p, "grad", torch.full((3,), 2.0, dtype=torch.float64)))
        q.grad = torch.full((3,), 2.0, dtype=torch.float64)
        plain.step()
        assert torch.allclose(p.detach(), q.detach(), rtol=1e-14)

    step_both()
    opt.state.clear()
    plain.state.clear()
    step_both()
    opt.state[p]["momentum_buffer"] = torch.full((3,), 5.0, dtype=torch.float64)
    plain.state[q]["momentum_buffer"] = torch.full((3,), 5.0, dtype=torch.float64)
    step_both()
    opt.state[p] = {}
    plain.state[q] = {}
    step_both()
    opt.state[p]["momentum_buffer"] = None
    plain.state[q]["momentum_buffer"] = None
    step_both()


def test_parameters_that_are_frozen_and_thawed(backend):
    net = make_net()
    opt = method_named("LookSAM").make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(3))
    frozen = weights(net.conv)
    net.conv.requires_grad_(False)
    opt.zero_grad()
    train(net, opt, range(3, 6))
    assert same_bits(weights(net.conv), frozen)
    net.conv.requires_grad_(True)
    train(net, opt, range(6, 9))
    assert not same_bits(weights(net.conv), frozen)


@pytest.mark.parametrize("name", ["SAM", "LookSAM"])
def test_weights_that_are_moved_or_cast_between_steps(name, backend):
    """p.data may get new memory, another dtype, another layout: state and caches follow."""
    net = make_net(torch.float32)
    opt = method_named(name).make(net.parameters(), MOMENTUM, backend=backend)
    train(net, opt, range(2), torch.float32)
    for p in net.parameters():
        p.data = p.data.clone()
    train(net, opt, range(2, 4), torch.float32)
    twin, other = copy.deepcopy((net, opt))
    net.to(memory_format=torch.channels_last)  # with k = 3, between the step that looked and those that reuse
    train(net, opt, range(4, 6), torch.float32)
    train(twin, other, range(4, 6), torch.float32)
    assert torch.allclose(flat(net), flat(twin), atol=1e-5)
    twin, other = copy.deepcopy((net, opt))
    twin.to(memory_format=torch.contiguous_format)
    train(net, opt, range(6, 8), torch.float32)
    train(twin, other, range(6, 8), torch.float32)
    assert torch.allclose(flat(net), flat(twin), atol=1e-5)
    net.double()
    train(net, opt, range(8, 10), torch.float64)
    assert opt.state[net.head.weight]["momentum_buffer"].dtype == torch.float64


def test_the_base_may_load_a_plain_checkpoint_itself(backend):
    """Its groups then lack our options: those of the constructor hold."""
    net, twin = make_net(), make_net()
    opt = samkern.LookSAM(net.parameters(), torch.optim.SGD, rho=0.3, alpha=0.4, k=2, lr=0.1, backend=backend)
    other = samkern.LookSAM(twin.parameters(), torch.optim.SGD, rho=0.3, alpha=0.4, k=2, lr=0.1, backend=backend)
    opt.base.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())
    train(net, opt, range(3))
    train(twin, other, range(3))
    assert same_bits(weights(net), weights(twin))


def test_a_buffer_that_was_never_written_is_not_in_the_checkpoint(backend):
    """A first step that was skipped leaves what torch's SGD has before its first step: nothing."""
    p = nn.Parameter(torch.ones(3))
    opt = samkern.SAM([p], torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    opt.step(lambda: setattr(p, "grad", torch.full((3,), torch.nan)))
    assert opt.skips == 1
    assert opt.state_dict()["state"] == {}


def test_a_checkpoint_right_after_a_group_was_added(backend):
    """No step has seen the new parameters yet; what is kept knows them all the same."""
    p = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    q = [nn.Parameter(x.detach().clone()) for x in p]

    def step(opt, params):
        opt.step(lambda: [setattr(x, "grad", torch.arange(3.0)) for x in params])

    opt = samkern.LookSAM(p[:1], torch.optim.SGD, lr=0.1, momentum=0.9, k=2, backend=backend)
    step(opt, p)
    opt.add_param_group({"params": p[1:]})
    q[0].data.copy_(p[0].data)
    other = samkern.LookSAM([{"params": q[:1]}, {"params": q[1:]}], torch.optim.SGD, lr=0.1, k=2, backend=backend)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for _ in range(3):
        step(opt, p)
        step(other, q)
    assert same_bits([x.detach() for x in p], [x.detach() for x in q])


def test_a_checkpoint_of_another_number_of_parameters_is_refused_as_a_whole():
    p = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = samkern.SAM(p, torch.optim.SGD, lr=0.1)
    state = opt.state_dict()
    state["samkern"]["cache_norm"] = torch.zeros(2, dtype=torch.float64)
    state["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match="the checkpoint is of 1 parameters, this optimizer has 2"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1
