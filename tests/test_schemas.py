"""The list ops as torch sees them: honest schemas, fakes, torch.compile."""

from __future__ import annotations

import pytest
import torch

import samkern
from samkern import ops
from samkern.backends import native
from samkern.ops import dispatch

from .lists import FP64, clones, random_list, same_bits, scalar
from .test_compile import counted_autograd

pytestmark = pytest.mark.skipif(native is None, reason="samkern._C is not built: there are no registered ops")
SHAPES = [(5, 3), (), (70_000,), (0,)]
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def samples():
    torch.manual_seed(0)
    w, g, c, v = (random_list(SHAPES) for _ in range(4))
    step = [torch.tensor(2.0) for _ in w]
    parts = [c, g, scalar(1), scalar(0.5), scalar(0.9), torch.tensor(False)]
    yield "norms", (w, g, c, "filter", 0.1), {}
    yield "norms", (w, [], []), {}
    yield "difference_dot", (w, g, c, v), {}
    yield "perturb_", (w, g, v, torch.rand(4, dtype=FP64)), {"direction": "element", "eta": 0.1}
    yield "perturb_", (w, g, v, scalar(0.1)), {"direction": "filter", "eta": 0.1}
    bits = ops.random_mask(w, 70_000, backend="cpu").bits
    yield "norms", (w, g, c, "filter", 0.1, bits), {}
    yield "perturb_", (w, g, v, scalar(0.1)), {"mask": bits}
    yield "gaussian_perturb_", (w, v, 0.1, 1, 2), {"draw": 3, "first": 5, "mask": bits}
    yield "gaussian_perturb_", (w, v, 0.1, -1, 2), {"scale": "given", "norms": torch.rand(70_006, dtype=FP64)}
    yield "gaussian_perturb_", (w, v, 0.1, 1, 2, 3, 5, "tensor"), {"from_saved": True}
    yield "restore_", (w, g), {}
    yield "decompose_", (c, g, v, scalar(0.5), torch.zeros(5, dtype=FP64)), {}
    yield "combine_", (c, g, v, scalar(0.5), scalar(2.0)), {}
    yield "topk_mask_", (g, 40_000, bits, torch.zeros((), dtype=torch.int64)), {}
    yield "drop_grow_mask_", (bits, g, 500, 1, 2), {"regrow": False, "skip": torch.tensor(False)}
    yield "drop_grow_mask_", (bits, g, 500, -1, 2, False), {}
    yield "fisher_accumulate_", (c, g, 0.9, 0.1), {"scale": scalar(0.5), "skip": torch.tensor(False)}
    yield "update_sgd_", (w, g, v, [], []), {"lr": 0.1, "momentum": 0.9}
    yield "update_sgd_", (w, g, v, *parts), {"lr": 0.1, "momentum": 0.9, "first": torch.tensor(True)}
    yield "update_adam_", (w, g, v, [x.abs() for x in c], step, [], []), ADAM
    yield "update_adamw_", (w, g, v, [x.abs() for x in c], step, *parts), ADAM


SAMPLES = list(samples())


@pytest.mark.parametrize(
    ("name", "args", "kwargs"), SAMPLES, ids=[f"{i}-{sample[0]}" for i, sample in enumerate(SAMPLES)]
)
def test_opcheck(name, args, kwargs):
    """Schema against what is really written, fake against real, and the functionalised graph."""
    torch.library.opcheck(getattr(torch.ops.samkern, name).default, args, kwargs)


def test_every_op_is_sampled():
    assert {name for name, _, _ in SAMPLES} == {*dispatch._OPS.values(), "decompose_"}


@pytest.mark.parametrize("name", dispatch._TRACED)
def test_opcheck_of_what_compilers_trace(name):
    """The twins whose numbers are tensors."""
    op, numbers = dispatch._TRACED[name]
    names = [argument.name for argument in getattr(torch.ops.samkern, dispatch._OPS[name]).default._schema.arguments]
    defaults = {"eta": 0.1, "dampening": 0.0, "weight_decay": 0.0}
    _, args, kwargs = next(sample for sample in SAMPLES if sample[0] == dispatch._OPS[name])
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    values = [torch.tensor(given[number]) for number in numbers]
    others = {key: value for key, value in given.items() if key in names and key not in numbers}
    torch.library.opcheck(op.default, (values,), others)


def test_opcheck_finds_an_undeclared_write():
    """What the schema test is worth: an op that writes more than it says is caught."""
    with torch.library._scoped_library("samkern_broken", "DEF") as library:
        library.define("restore_(Tensor(a!) w, Tensor saved) -> ()")
        library.impl("restore_", lambda w, saved: (w.copy_(saved), saved.zero_(), None)[-1], "CPU")
        with pytest.raises(Exception, match=r"saved|mutat"):
            op = torch.ops.samkern_broken.restore_.default
            torch.library.opcheck(op, (torch.zeros(3), torch.ones(3)), test_utils="test_schema")


SMALL = [(5, 3), (), (7,)]
MASK = ops.random_mask(random_list(SMALL), 11, backend="reference")


def step_of(t: int) -> list[torch.Tensor]:
    return [torch.tensor(float(t)) for _ in SMALL]


# Every function of samkern.ops: how many lists it takes, and a call with a number that changes from call to call. What is
# random in a list is made positive where an op needs that.
COMPILED = {
    "norms": (3, lambda x, a, b, w: ops.norms(a, b, w, weighting="filter", eta=x, mask=MASK)),
    "difference_dot": (4, lambda x, a, b, c, d: ops.difference_dot(a, b, c, d)),
    "perturb": (3, lambda x, w, g, saved: ops.perturb(w, g, saved, x, mode="filter", eta=x, mask=MASK)),
    "gaussian_perturb": (2, lambda x, w, saved, k: ops.gaussian_perturb(w, saved, x, seed=k, t=k, draw=k, mask=MASK)),
    "restore": (2, lambda x, w, saved: ops.restore(w, saved)),
    "decompose": (3, lambda x, c, g, g_s: ops.decompose(c, g, g_s)),
    "combine": (3, lambda x, u, a, b: ops.combine(u, a, b, *torch.full((2,), 0.5, dtype=FP64))),
    "update_sgd": (3, lambda x, w, u, v: ops.update_sgd(w, u, v, lr=x, momentum=0.9, weight_decay=x)),
    "update_adam": (4, lambda x, w, u, m, v: ops.update_adam(w, u, m, [y.abs_() for y in v], step_of(2), lr=x)),
    "update_adamw": (4, lambda x, w, u, m, v: ops.update_adamw(w, u, m, [y.abs_() for y in v], step_of(2), lr=x)),
    "topk_mask": (1, lambda x, scores, k: ops.topk_mask(scores, k, nan="last").bits),
    "drop_grow_mask": (
        1,
        lambda x, g, k, bits: ops.drop_grow_mask(samkern.BitMask(bits, MASK.shapes), g, 3, seed=k, t=k),
    ),
    "grow_mask": (1, lambda x, g, k, bits: ops.grow_mask(samkern.BitMask(bits, MASK.shapes), g, k)),
    "random_mask": (1, lambda x, like, k: ops.random_mask(like, 4, seed=k).bits),
    "fisher_accumulate": (2, lambda x, f, g: ops.fisher_accumulate(f, g, keep=x, gain=1 - x)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_ops_in_a_compiled_region(name):
    """One whole graph, what it writes reaches the caller's tensors, and numbers become variables when they first change."""
    n_lists, function = COMPILED[name]
    names = function.__code__.co_varnames[1 + n_lists :]  # k and bits, if they are arguments
    backend, n_graphs = counted_autograd()
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for i in range(4):
        lists = [random_list(SMALL) for _ in range(n_lists)]
        more = {"k": 3 + i, "bits": MASK.bits.clone()}
        twins = [clones(tensors) for tensors in lists], {**more, "bits": MASK.bits.clone()}
        expected = function(0.1 * (i + 1), *lists, **{key: more[key] for key in names if key in more})
        if i == 2:
            warm = n_graphs["forward"]
        found = compiled(0.1 * (i + 1), *twins[0], **{key: twins[1][key] for key in names if key in more})
        assert (found is None and expected is None) or torch.equal(found, expected)
        assert all(same_bits(a, b) for a, b in zip(lists, twins[0], strict=True))
        assert torch.equal(more["bits"], twins[1]["bits"])
    assert n_graphs["forward"] == warm <= 2


def test_every_op_is_compiled():
    assert COMPILED.keys() == set(ops.__all__)


def test_reading_the_device_in_a_compiled_region():
    """To look for NaNs breaks the graph; a whole one is refused, and the message says what to do."""
    x = [torch.tensor([1.0, torch.nan])]
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"nan='raise' reads the device, .*: pass nan='last'"):
        torch.compile(lambda x: ops.topk_mask(x, 1).bits, fullgraph=True, backend="eager")(x)
    broken = torch.compile(lambda x: ops.topk_mask([y + 1 for y in x], 1).bits, backend="eager")
    assert torch.equal(broken([torch.arange(3.0)]), ops.topk_mask([torch.arange(3.0)], 1).bits)
    with pytest.raises(ValueError, match="1 scores are NaN"):
        broken(x)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("must have the strides", lambda op, w: op.perturb_([w], [w], [torch.ones(3, 2).t()], scalar(1))),
        ("has 2 tensors, expected 1", lambda op, w: op.restore_([w], [w, w])),
        ("has shape", lambda op, w: op.restore_([w], [w[:1]])),
        (r"d has 0 tensors, expected 1", lambda op, w: op.difference_dot([w], [w], [w], [])),
        (r"b\[0\] has shape", lambda op, w: op.difference_dot([w], [w[:1]], [w], [w])),
        ("must be dense", lambda op, w: op.restore_([w[:, :1]], [w[:, :1]])),
        ("must be float64 with 1 or 1 entries", lambda op, w: op.perturb_([w], [w], [w.clone()], torch.ones(3))),
        ("needs both coefficients", lambda op, w: op.update_sgd_([w], [w], [], [], [w], lr=0.1)),
        ("expected gradient, sign", lambda op, w: op.perturb_([w], [w], [w.clone()], scalar(1), "up")),
        (
            r"mask must be contiguous uint8 with 4 entries",
            lambda op, w: op.norms([w], [], [], mask=torch.zeros(5).byte()),
        ),
        ("bits must be contiguous uint8", lambda op, w: op.topk_mask_([w], 1, torch.zeros(4), torch.tensor(0))),
        ("n_nan must be one int64", lambda op, w: op.topk_mask_([w], 1, torch.zeros(4).byte(), torch.zeros(1))),
        (r"k must be in \[0, 6\]", lambda op, w: op.topk_mask_([w], 7, torch.zeros(4).byte(), torch.tensor(0))),
        ("must be contiguous, got", lambda op, w: op.drop_grow_mask_(torch.zeros(4).byte(), [w.t()], 1, 0, 0)),
        (
            "expected filter, tensor or given, got up",
            lambda op, w: op.gaussian_perturb_([w], [w.clone()], 1, 0, 0, 0, 0, "up"),
        ),
        ("norms go with scale 'given'", lambda op, w: op.gaussian_perturb_([w], [w.clone()], 1, 0, 0, norms=scalar(1))),
        (
            "norms must be contiguous float64 with 2 entries",
            lambda op, w: op.gaussian_perturb_([w], [w.clone()], 1, 0, 0, scale="given", norms=torch.ones(3)),
        ),
        (r"saved\[0\] must be Float", lambda op, w: op.gaussian_perturb_([w], [w.double()], 1, 0, 0)),
        (r"draw must be in \[0, 2\^24\)", lambda op, w: op.gaussian_perturb_([w], [w.clone()], 1, 0, 0, 1 << 24)),
        ("first must be >= 0", lambda op, w: op.gaussian_perturb_([w], [w.clone()], 1, 0, 0, 0, -1)),
        ("std must be a finite number", lambda op, w: op.gaussian_perturb_([w], [w.clone()], -1, 0, 0)),
        ("t must be in", lambda op, w: op.gaussian_perturb_([w], [w.clone()], 1, 0, -1)),
        ("t must be in", lambda op, w: op.drop_grow_mask_(torch.zeros(4).byte(), [w], 1, 0, -1)),
        ("must have one entry", lambda op, w: op.update_adam_([w], [w], [w], [w], [w], [], [], **ADAM)),
    ],
)
def test_a_direct_call_cannot_touch_foreign_memory(message, call):
    w = torch.ones(2, 3)
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        call(torch.ops.samkern, w)
