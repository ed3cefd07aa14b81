"""The list ops as torch sees them: honest schemas, fakes, torch.compile."""

from __future__ import annotations

import pytest
import torch

from samkern import ops
from samkern.backends import native
from samkern.ops import dispatch

from .lists import FP64, clones, random_list, same_bits, scalar

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


def test_opcheck_finds_an_undeclared_write():
    """What the schema test is worth: an op that writes more than it says is caught."""
    with torch.library._scoped_library("samkern_broken", "DEF") as library:
        library.define("restore_(Tensor(a!) w, Tensor saved) -> ()")
        library.impl("restore_", lambda w, saved: (w.copy_(saved), saved.zero_(), None)[-1], "CPU")
        with pytest.raises(Exception, match=r"saved|mutat"):
            op = torch.ops.samkern_broken.restore_.default
            torch.library.opcheck(op, (torch.zeros(3), torch.ones(3)), test_utils="test_schema")


def test_ops_in_a_compiled_region():
    """Mutations in a compiled function reach the caller's tensors, and the graph does not break."""

    def sam_like(w, g, saved):
        sums = ops.perturb(w, g, saved, 0.1)
        ops.update_sgd(w, g, lr=0.1, saved=saved)
        return sums[0, -1]

    w, g = random_list([(5, 3), (7,)]), random_list([(5, 3), (7,)])
    expected, saved = clones(w), clones(w)
    norm = sam_like(expected, g, clones(w))
    compiled = torch.compile(sam_like, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w, g, saved), norm)
    assert same_bits(w, expected)


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
        ("t must be in", lambda op, w: op.drop_grow_mask_(torch.zeros(4).byte(), [w], 1, 0, -1)),
        ("must have one entry", lambda op, w: op.update_adam_([w], [w], [w], [w], [w], [], [], **ADAM)),
    ],
)
def test_a_direct_call_cannot_touch_foreign_memory(message, call):
    w = torch.ones(2, 3)
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        call(torch.ops.samkern, w)
