"""The reference passes on cases small enough to check by hand. They judge everything else, so nothing else judges them."""

import math
from pathlib import Path

import pytest
import torch

from samkern import reference

from .lists import BF16, FP64, scalar


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=FP64)


def test_norms():
    sums = reference.norms([vec(3, 4), vec(1)], [vec(1, 2), vec(-5)], [vec(2, 0), vec(7)])
    assert sums.tolist() == [
        [25, 1, 26],  # aa
        [11, -5, 6],  # ab
        [5, 25, 30],  # bb
        [4, 49, 53],  # ww
        [25, 1, 26],  # tt: T = 1
    ]


def test_difference_dot():
    a, b, c, d = [vec(3, 4), vec(1)], [vec(1, 5), vec(3)], [vec(7, 0), vec(2)], [vec(2, 2), vec(-1)]
    assert reference.difference_dot(a, b, c, d).tolist() == [12, -6, 6]
    assert reference.difference_dot(a, b, a, b).tolist() == [5, 4, 9]


def test_differences_are_in_the_dtype_of_the_first_list():
    """2^-30 is lost beside 1 in float32, whatever the others are in."""
    x, y = vec(1 + 2**-30), vec(1)
    assert reference.difference_dot([x], [y], [x], [y]).tolist() == [2**-60] * 2
    assert reference.difference_dot([x.float()], [y], [x], [y]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("element", (3 * 1) ** 2 + (4 * 2) ** 2 + (5 * 3) ** 2 + (1 * 4) ** 2),
        ("filter", (5 + 1) ** 2 * (1 + 4) + (0 + 1) ** 2 * (9 + 16)),
        ("layer", (5 + 1) ** 2 * (1 + 4 + 9 + 16)),
    ],
)
def test_weighted_norms(weighting, expected):
    """w = [[3, 4], [0, 0]], a = [[1, 2], [3, 4]], eta = 1; filters are the rows."""
    w, a = vec(3, 4, 0, 0).reshape(2, 2), vec(1, 2, 3, 4).reshape(2, 2)
    if weighting == "element":
        expected = (4 * 1) ** 2 + (5 * 2) ** 2 + (1 * 3) ** 2 + (1 * 4) ** 2
    assert reference.norms([a], (), [w], weighting=weighting, eta=1.0)[4, 0] == expected


def test_a_filter_of_one_dimension_is_an_entry():
    w, a = vec(3, -4), vec(1, 2)
    by_filter = reference.norms([a], (), [w], weighting="filter", eta=0.5)
    by_element = reference.norms([a], (), [w], weighting="element", eta=0.5)
    assert torch.equal(by_filter, by_element)


def test_finite():
    assert reference.finite(vec(1.0, 3.4e38), [torch.ones(1), torch.ones(1)])
    assert not reference.finite(vec(1.0, 3.5e38), [torch.ones(1), torch.ones(1)])
    assert reference.finite(vec(1.0, 3.5e38), [torch.ones(1), torch.ones(1, dtype=FP64)])
    assert not reference.finite(vec(1.0, math.nan), [torch.ones(1), torch.ones(1, dtype=FP64)])


@pytest.mark.parametrize(
    ("climb", "expected"),
    [
        ("euclidean", 0.5 / 2),
        ("sign", 0.5),
        ("element", 0.5 / 2),
        ("layer", 0.5 / 2 * (3 + 1) ** 2),
        ("lars", 0.5 * 3 / 4),
        ("layer_sign", 0.5 * 3 / 4),
        ("trust", 0.5 / 2 * 0.7),
    ],
)
def test_climb_scale(climb, expected):
    """rho = 0.5, norm(w_i) = 3, norm(g_i) = 4, norm = 2, eta = 1, trust_clip = 0.7 < 3 / 4."""
    scale = reference.climb_scale(climb, 0.5, vec(9), vec(16), scalar(2), eta=1.0, trust_clip=0.7)
    assert scale.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("climb", reference.CLIMBS)
def test_zero_gradient_or_weight_climbs_nowhere(climb):
    """Neither NaN nor an infinite scale times zero."""
    scale = reference.climb_scale(climb, 0.5, vec(0, 9), vec(0, 0), scalar(0), eta=0.0)
    assert torch.isfinite(scale).all()


def test_scalars_of_a_mix():
    assert reference.project_coeff(vec(6, 1), vec(3, 0)).tolist() == [2, 0]
    assert reference.reuse_coeff(0.5, vec(16, 16), vec(2, 0)).tolist() == [1, 0]
    assert reference.kept_cache_norm(vec(4, 1e-16), vec(4, 1), 1e-6).tolist() == [2, 0]
    assert reference.clip_factor(1.0, vec(4 - 1e-6, 0.5)).tolist() == [0.25, 1]


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("gradient", [3 + 0.5 * 1, -4 + 0.5 * -2]),
        ("sign", [3.5, -4.5]),
        ("element", [3 + 0.5 * 16 * 1, -4 + 0.5 * 25 * -2]),
    ],
)
def test_perturb(direction, expected):
    w, saved = vec(3, -4), vec(9, 9)
    reference.perturb([w], [vec(1, -2)], [saved], scalar(0.5), direction=direction, eta=1.0)
    assert w.tolist() == expected
    assert saved.tolist() == [3, -4]


def test_perturb_by_filters():
    """Rows [3, 4] and [0, 0]: T = 5 and 0 with eta = 0."""
    w, saved = vec(3, 4, 0, 0).reshape(2, 2), torch.zeros(2, 2, dtype=FP64)
    reference.perturb([w], [vec(1, 2, 3, 4).reshape(2, 2)], [saved], scalar(0.1), direction="filter", eta=0.0)
    assert torch.allclose(w, vec(3 + 2.5, 4 + 5, 0, 0).reshape(2, 2))


def test_perturb_rounds_once_and_ignores_a_bad_scale():
    w, saved = torch.tensor([1.0], dtype=BF16), torch.zeros(1, dtype=BF16)
    reference.perturb([w], [torch.tensor([1.0])], [saved], scalar(0.01))
    assert w.item() == 1.0078125  # 1.01 to bf16's 8 bits
    reference.perturb([w], [torch.tensor([math.nan])], [saved], scalar(math.nan))
    assert w.item() == saved.item() == 1.0078125


def test_restore_decompose_combine():
    w, c, u = vec(1, 2), vec(0, 0), vec(0, 0)
    reference.restore([w], [vec(5, 6)])
    assert w.tolist() == [5, 6]
    cc = reference.decompose([c], [vec(1, 0)], [vec(2, 3)], scalar(2))
    assert c.tolist() == [0, 3]
    assert cc.tolist() == [9, 9]
    reference.combine([u], [vec(1, 2)], [vec(10, 20)], scalar(2), scalar(0.5))
    assert u.tolist() == [7, 14]


def test_sgd():
    """d = clip (A u + B c) + wd w = 0.5 (1 * 2 + 2 * 3) + 0.1 * 10 = 5;  v = 0.9 * 1 + 0.8 * 5 = 4.9."""
    w, v = vec(99), vec(1)
    parts = {"saved": [vec(10)], "cache": [vec(3)], "coeff_a": scalar(1), "coeff_b": scalar(2), "clip": scalar(0.5)}
    reference.update_sgd([w], [vec(2)], [v], lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1, **parts)
    assert v.item() == pytest.approx(4.9)
    assert w.item() == pytest.approx(10 - 0.49)
    reference.update_sgd([w], [vec(2)], [v], lr=0.1, momentum=0.9, dampening=0.2, first=torch.tensor(True))
    assert v.item() == 2.0  # undampened, and without the old buffer
    reference.update_sgd([w := vec(1)], [vec(2)], [v := vec(1)], lr=0.1, momentum=0.5, nesterov=True)
    assert v.item() == 2.5
    assert w.item() == pytest.approx(1 - 0.1 * (2 + 0.5 * 2.5))


def test_adam():
    """First step from zero state: m / bias1 = u, sqrt(v) / bias2 = |u|, so w moves by lr * sign(u), less eps."""
    w, m, v, step = vec(1), vec(0), vec(0), torch.zeros(())
    reference.update_adam([w], [vec(-4)], [m], [v], [step], lr=0.1, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.0)
    assert w.item() == pytest.approx(1.1)
    assert (m.item(), v.item(), step.item()) == pytest.approx((-0.4, 0.16, 1))
    w, m, v, step = vec(1), vec(0), vec(0), torch.zeros(())
    reference.update_adamw([w], [vec(-4)], [m], [v], [step], lr=0.1, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.5)
    assert w.item() == pytest.approx(1 - 0.05 + 0.1)


def test_skip_restores_and_writes_nothing_else():
    skip = torch.tensor(True)
    w, v = vec(99), vec(1)
    reference.update_sgd([w], [vec(math.nan)], [v], lr=0.1, momentum=0.9, saved=[vec(10)], skip=skip)
    assert (w.item(), v.item()) == (10, 1)
    w, m, v, step = vec(99), vec(1), vec(2), torch.tensor(3.0)
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    reference.update_adam([w], [vec(math.nan)], [m], [v], [step], saved=[vec(10)], skip=skip, **options)
    assert (w.item(), m.item(), v.item(), step.item()) == (10, 1, 2, 3)


def test_imports_nothing_of_the_package():
    source = Path(reference.__file__).read_text()
    assert "from ." not in source
    assert "import samkern" not in source
