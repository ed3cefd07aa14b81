"""``torch.compile`` of models, closures and steps: graphs are counted, and numbers are those of the eager model.

A custom backend is called once for each graph that the compiler makes. Those here run the graph as it is, so that numbers
are equal bit by bit, but for one test. ``examples/compiled.py``, which tests run too, takes the default backend.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.nn import functional as F

import samkern

from .lists import same_bits
from .methods import METHODS, MOMENTUM, SAM, method_named
from .problems import batch, closure_for, flat, make_net, weights
from .test_batchnorm import NORMS, buffers, make_model

SGD = torch.optim.SGD


class Counting:
    """A backend for ``torch.compile`` that keeps the graphs it was given."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def __len__(self):
        return len(self.graphs)

    def calls(self):
        """What each graph calls, by name."""
        return [
            [getattr(node.target, "__name__", node.target) for node in graph.graph.nodes if node.op.startswith("call_")]
            for graph in self.graphs
        ]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(net, how, backend):
    """What to call, after compiling ``net`` so."""
    if how == "in place":
        net.compile(backend=backend)
        return net
    return torch.compile(net, backend=backend)


def training(model, opt, with_closure=True, run=lambda function: function):
    """Steps that call ``model``; ``run`` may compile the closure."""

    def loss_of(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    def closure():
        opt.zero_grad()
        return loss_of(*data)

    def halves():
        loss = loss_of(*data)
        if opt.first_step():
            loss_of(*data)
        opt.second_step(zero_grad=True)
        return loss

    closure = run(closure)
    data = None

    def step(t):
        nonlocal data
        data = batch(t, torch.float32)
        return opt.step(closure) if with_closure else halves()

    return step


def results(net, opt):
    state = [x for values in opt.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in (*weights(net), *net.buffers(), *state)]


# ---- a compiled model


@pytest.mark.parametrize("with_closure", [True, False], ids=["closure", "halves"])
@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if m.name in ("SAM", "ASAM_filter", "LookSAM", "SSAMD", "ARSAM")],
    ids=lambda m: m.name,
)
def test_both_passes_run_one_graph_and_nothing_is_compiled_again(method, with_closure):
    """Over looks and steps between them, a new learning rate in each step, evaluation before and after."""
    nets = [make_net(torch.float32) for _ in range(2)]
    graphs, ends = Counting(), []
    for net, model in zip(nets, [nets[0], compiled(nets[1], "wrapped", graphs)], strict=True):
        opt = method.make(model.parameters(), MOMENTUM, model=model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=12)
        step = training(model, opt, with_closure)
        losses = [step(0)]
        with torch.compiler.set_stance("fail_on_recompile"):
            for t in range(1, 8):
                schedule.step()
                losses.append(step(t))
        ends.append([*losses, *results(net, opt)])
    assert same_bits(*ends)
    assert len(graphs) == 1


def test_a_recompile_would_be_noticed():
    model = compiled(make_net(torch.float32), "wrapped", Counting())
    step = training(model, SAM.make(model.parameters(), MOMENTUM))
    step(0)
    model.eval()
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        step(1)


@pytest.mark.parametrize(
    ("how", "given", "n_graphs"), [("wrapped", True, 1), ("wrapped", False, 2), ("in place", True, 1)]
)
def test_which_module_is_given_as_model(how, given, n_graphs):
    """Statistics are frozen with any; the compiler sees that only if ``model=`` is not the compiled one."""
    net, twin = (make_net(torch.float32) for _ in range(2))
    graphs = Counting()
    model = compiled(net, how, graphs)
    ends = []
    for each, called, known in ((net, model, model if given else net), (twin, twin, twin)):
        opt = SAM.make(called.parameters(), MOMENTUM, model=known)
        step = training(called, opt)
        for t in range(4):
            step(t)
        ends.append(results(each, opt))
    assert same_bits(*ends)
    assert len(graphs) == n_graphs
    assert net.norm.num_batches_tracked == 4
    assert net.norm.track_running_stats


@pytest.mark.parametrize("norm", NORMS)
def test_statistics_of_a_compiled_model_are_frozen(norm):
    model = make_model(norm)
    twin = copy.deepcopy(model)
    graphs = Counting()
    called = compiled(model, "wrapped", graphs)
    x = torch.randn(8, 4)
    for _ in range(2):  # some write what has a gradient to their buffers, which is another graph
        y, expected = called(x), twin(x)
    before, n_graphs = buffers(model), len(graphs)  # a graph, and none where the compiler gives up
    with samkern.frozen_running_stats(called):
        frozen = called(x)
        assert norm in ("no_statistics", "evaluation") or not same_bits(buffers(model), before)
    assert same_bits(buffers(model), before)
    assert same_bits([y, frozen], [expected, twin(x)])
    assert len(graphs) == n_graphs


def test_a_block_compiled_by_itself():
    """Regional compilation: the model is an ordinary one, of a block that is compiled in place."""
    nets = [make_net(torch.float32) for _ in range(2)]
    graphs, ends = Counting(), []
    for net, is_compiled in zip(nets, (False, True), strict=True):
        if is_compiled:
            net.norm = torch.compile(net.norm, backend=graphs)
        opt = SAM.make(net.parameters(), MOMENTUM, model=net)
        step = training(net, opt)
        for t in range(3):
            step(t)
        ends.append(results(net, opt))
    assert same_bits(*ends)
    assert len(graphs) == 1


def test_every_set_of_sampled_components_is_a_graph():
    """``requires_grad`` is part of a graph: two components make at most three, and after those none."""
    net = make_net(torch.float32)
    twin = copy.deepcopy(net)
    graphs, ends, sampled = Counting(), [], set()
    for each, model in ((net, compiled(net, "wrapped", graphs)), (twin, twin)):
        opt = samkern.ARSAM(
            each.parameters(), SGD, lr=0.1, rho=0.1, window=1, max_rate=1.0, warmup_steps=0,
            components=[[each.head.weight, each.head.bias]], change_tol=0.05, max_component_age=100, model=model,
        )  # fmt: skip
        each.register_forward_pre_hook(
            lambda module, x: sampled.add(tuple(p.requires_grad for p in module.parameters()))
        )
        step = training(model, opt)
        for t in range(12):
            step(t)
        ends.append(weights(each))
    assert len(sampled) > 1
    assert len(graphs) == len(sampled)
    assert same_bits(*ends)


def test_an_exception_in_the_second_pass_of_a_compiled_model():
    net = make_net(torch.float32)
    graphs = Counting()
    model = compiled(net, "wrapped", graphs)
    opt = SAM.make(model.parameters(), MOMENTUM, model=model)
    step = training(model, opt)
    step(0)
    before = results(net, opt)
    with failing_backward(net, at=2), pytest.raises(RuntimeError, match="on purpose"):
        step(1)
    assert same_bits(weights(net), before[: len(weights(net))])
    step(1)
    assert len(graphs) == 1


@contextlib.contextmanager
def failing_backward(net, at):
    """The ``at``-th backward in the block raises."""
    n = 0

    def count(grad):
        nonlocal n
        n += 1
        if n == at:
            raise RuntimeError("on purpose")

    handle = net.head.bias.register_hook(count)
    try:
        yield
    finally:
        handle.remove()


# ---- other backends


def counted_autograd():
    """AOTAutograd as its documentation has it for custom backends: forward and backward graphs, counted."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    counts = {"forward": 0, "backward": 0}

    def count(name):
        def compiler(graph, inputs):
            counts[name] += 1
            return make_boxed_func(graph.forward)

        return compiler

    return aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward")), counts


def test_backwards_are_compiled_once():
    """Forward and backward graphs, with numbers up to rounding: the traced backward of BatchNorm is another formula."""
    backend, counts = counted_autograd()
    net, twin = (make_net(torch.float32) for _ in range(2))
    for model in (compiled(net, "wrapped", backend), twin):
        opt = method_named("LookSAM").make(model.parameters(), MOMENTUM, model=model)
        step = training(model, opt)
        for t in range(8):
            step(t)
        assert opt.evaluations == 11
    assert counts == {"forward": 1, "backward": 1}
    assert (flat(net) - flat(twin)).norm() < 1e-5 * flat(twin).norm()
    assert torch.allclose(net.norm.running_var, twin.norm.running_var, rtol=1e-5)


# ---- a compiled closure, a compiled step


@pytest.mark.parametrize(
    ("what", "name", "n_graphs"),
    # Without a closure there are two places in the code; a pass with frozen statistics is a graph of its own.
    [("closure", "LookSAM", 2), ("step", "SSAMD", 2), ("halves", "LookSAM", 2)],
)
def test_compiling_more_than_the_model(what, name, n_graphs):
    """A graph for each kind of pass, and of our half-steps none."""
    graphs, ends = Counting(), []
    for is_compiled in (False, True):
        net = make_net(torch.float32)
        opt = method_named(name).make(net.parameters(), MOMENTUM, model=net)

        def compile_it(function, is_compiled=is_compiled):
            return torch.compile(function, backend=graphs) if is_compiled else function

        step = training(net, opt, what != "halves", compile_it if what == "closure" else lambda function: function)
        if what != "closure":
            step = with_data_outside(net, opt, what == "step", compile_it)
        for t in range(6):
            opt.param_groups[0]["lr"] *= 0.9
            step(t)
        ends.append(results(net, opt))
    assert same_bits(*ends)
    of_model = [calls for calls in graphs.calls() if "conv2d" in calls]
    assert len(of_model) == n_graphs
    assert all(calls in ([], ["detach"]) for calls in graphs.calls() if calls not in of_model)


def with_data_outside(net, opt, with_closure, compile_it):
    def loss_of(x, y):
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss.detach()

    def step(x, y):
        def closure():
            opt.zero_grad()
            return loss_of(x, y)

        return opt.step(closure)

    def halves(x, y):
        loss = loss_of(x, y)
        if opt.first_step():
            loss_of(x, y)
        opt.second_step()
        opt.zero_grad()
        return loss

    function = compile_it(step if with_closure else halves)
    return lambda t: function(*batch(t, torch.float32))


def test_a_compiled_pass_along_the_momentum():
    graphs, ends = Counting(), []
    for is_compiled in (False, True):
        net = make_net(torch.float32)
        opt = samkern.MSAM(net.parameters(), SGD, lr=0.1, momentum=0.9, rho=0.5, model=net)

        def step(x, y, net=net, opt=opt):
            with opt.perturbed():
                F.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()

        run = torch.compile(step, backend=graphs) if is_compiled else step
        for t in range(5):
            run(*batch(t, torch.float32))
        ends.append(results(net, opt))
    assert same_bits(*ends)
    assert len(graphs) == 1


def test_parts_in_a_compiled_step():
    """m-SAM: its closures run as they are."""
    ends = []
    for is_compiled in (False, True):
        net = make_net(torch.float32)
        opt = SAM.make(net.parameters(), MOMENTUM, model=net)

        def step(*parts, net=net, opt=opt):
            opt.step([closure_for(net, t, opt.zero_grad, torch.float32) for t in parts])

        run = torch.compile(step, backend=Counting()) if is_compiled else step
        for t in range(3):
            run(2 * t, 2 * t + 1)
        ends.append(results(net, opt))
    assert same_bits(*ends)


def test_a_whole_graph_of_a_step_is_refused():
    net = make_net(torch.float32)
    opt = SAM.make(net.parameters(), MOMENTUM)

    def closure():
        return F.cross_entropy(net(batch(0, torch.float32)[0]).double(), batch(0)[1])

    before = weights(net)
    for function in (opt.first_step, opt.second_step):
        with pytest.raises(
            Exception, match=r"samkern's half-steps call native kernels .* compile the model or the closure"
        ):
            torch.compile(function, fullgraph=True, backend=Counting())()
    assert same_bits(weights(net), before)


def test_a_failing_compiled_step_restores_the_weights():
    net = make_net(torch.float32)
    opt = SAM.make(net.parameters(), MOMENTUM, model=net)
    step = with_data_outside(net, opt, True, lambda function: torch.compile(function, backend=Counting()))
    step(0)
    before = weights(net)
    with failing_backward(net, at=2), pytest.raises(RuntimeError, match="on purpose"):
        step(1)
    assert same_bits(weights(net), before)
    assert net.norm.track_running_stats
    step(1)
    assert opt.steps == 2
