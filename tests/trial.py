"""Runs a random case beside its oracle, and looks after every event at what must hold.

Gradients come from a script, the same for both. After every step weights, state, caches and masks are compared; then the
oracle goes on from those of the optimizer. So a tolerance is that of one step, and nothing adds up.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import cases
from .cases import ERRORS, SHAPES, Case, Change, Step, Weight
from .lists import BF16, FP16, FP32, FP64, same_bits, same_tree, seeded

EPS = {FP64: 1e-12, FP32: 1e-6, BF16: 2**-8, FP16: 2**-11}
SMALLEST = {FP64: 1e-14, FP32: 1e-9, BF16: 1e-9, FP16: 1e-7}  # below, a number has fewer bits
# What a step that is skipped may change.
COUNTERS = ("t", "evaluations", "skips", "schedule", "reuse", "radius")


class Script:
    """The weights at the beginning, and gradients and losses of every pass."""

    def __init__(self, case: Case) -> None:
        self.seed = case.seed

    def random(self, *key: int) -> torch.Generator:
        return seeded(hash((self.seed, *key)) % 2**62)

    def weight(self, i: int, weight: Weight) -> nn.Parameter:
        generator, shape = self.random(0, i), SHAPES[weight.shape]
        if weight.shape == "with gaps":
            x = torch.randn(3, 8, generator=generator)[:, ::2].to(weight.dtype)
            x = torch.zeros(3, 8, dtype=weight.dtype)[:, ::2].copy_(x)
        else:
            x = torch.randn(shape, generator=generator).to(weight.dtype)
        if weight.shape == "transposed":
            x = x.t().contiguous().t()
        if weight.shape == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        return nn.Parameter(x, requires_grad=not weight.frozen)

    def gradients(
        self, n: int, number: int, step: Step, params: list[nn.Parameter], frozen: list[bool]
    ) -> list[Tensor | None]:
        """Of pass ``number`` in event ``n``; some of them expanded, or in another layout than the weights."""
        scale = torch.randn((), generator=self.random(1, n)).mul(0.7).exp()
        generator = self.random(2, n, number)
        missing = step.missing[number] if number < len(step.missing) else ()
        layouts = torch.randint(0, 8, (len(params),), generator=generator).tolist()
        gradients: list[Tensor | None] = []
        for i, (p, layout) in enumerate(zip(params, layouts, strict=True)):
            if i in missing or frozen[i]:
                gradients.append(None)
                continue
            g = scale * torch.randn(() if layout == 0 else p.shape, generator=generator)
            if i in step.zero and number == 0:
                g = torch.zeros_like(g)
            g = g.to(p.dtype).expand(p.shape)
            gradients.append(g.mT.contiguous().mT if layout == 1 and p.dim() > 1 else g)
        if step.bad is not None and step.bad[0] == number:
            self.spoil(gradients, step.bad[1], generator)
        return gradients

    def spoil(self, gradients: list[Tensor | None], value: float, generator: torch.Generator) -> None:
        there = [i for i, g in enumerate(gradients) if g is not None and g.numel()]
        if not there:
            return
        i = there[int(torch.randint(len(there), (), generator=generator))]
        spoilt = gradients[i].clone(memory_format=torch.contiguous_format)
        spoilt.view(-1)[int(torch.randint(spoilt.numel(), (), generator=generator))] = value
        gradients[i] = spoilt

    def loss(self, n: int, number: int) -> Tensor:
        return torch.randn((), generator=self.random(3, n, number)).exp()


class Closure:
    """Leaves the gradients of its passes, whose numbers are ``numbers``, and keeps the weights at which they were asked for."""

    def __init__(self, trial: Trial, params: list[Any], step: Step, numbers: tuple[int, ...]) -> None:
        self.trial, self.params, self.step, self.numbers = trial, params, step, numbers
        self.seen: list[list[Tensor]] = []
        self.gave: list[list[Tensor | None]] = []
        self.raised = False

    def __call__(self) -> Tensor:
        number = self.numbers[len(self.seen)]
        self.seen.append([p.detach().clone() for p in self.params])
        gradients = self.trial.gradients(self.step, number)
        self.gave.append(gradients)
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = None if g is None or not p.requires_grad else g.to(p.dtype)
        if self.step.fails is not None and self.step.fails[0] == number:
            self.raised = True
            raise ERRORS[self.step.fails[1]](f"in pass {number}")
        return self.trial.script.loss(self.trial.n, number)


class Trial:
    """A case on a backend. ``run()`` raises ``AssertionError`` if something does not hold."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        self.subject = cases.subject_named(case.subject)
        self.script, self.n = Script(case), 0
        self.weights, self.groups = list(case.weights), [dict(group) for group in case.groups]
        self.params = [self.script.weight(i, weight) for i, weight in enumerate(self.weights)]
        self.opt = self.make(self.params)
        self.w, self.oracle = [], None
        self.oracle = self.make_oracle()
        self.is_over = False  # weights are not finite, as it was asked for

    # ---- what is compared

    def make(self, params: list[nn.Parameter]) -> Any:
        groups = [{"params": [], **self.in_group(options)} for options in self.groups]
        for p, weight in zip(params, self.weights, strict=True):
            groups[weight.group]["params"].append(p)
        return self.subject.method.make(groups, self.case.base, backend=self.backend, **self.case.options)

    def in_group(self, options: dict[str, Any]) -> dict[str, Any]:
        """Our options of a group by the names that they have beside the base's."""
        taken = {"rho": torch.optim.Adadelta, "alpha": torch.optim.RMSprop}
        return {
            f"sam_{name}" if taken.get(name) is self.case.base.cls else name: value for name, value in options.items()
        }

    def make_oracle(self) -> Any:
        method, base = self.subject.method, self.case.base
        self.w = [self.twin(p) for p in self.params]
        columns = [self.of_weight(weight, self.groups[weight.group]) for weight in self.weights]
        of_base = {name: [column[1][name] for column in columns] for name in columns[0][1]}
        of_method = {name: [column[0][name] for column in columns] for name in columns[0][0]}
        options = {**method.options, **self.case.options, **of_method}
        options.pop("cache_dtype", None)
        oracle = cases.MICRO.get(method.oracle, method.oracle)
        return oracle(self.w, base.oracle(self.w, **of_base), **options)

    def twin(self, p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(p.detach().double().clone(memory_format=torch.contiguous_format), p.requires_grad)

    def of_weight(self, weight: Weight, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of a weight: the method's, which may differ by group, and the base's."""
        method, base = self.subject.method, self.case.base
        base_names = {"lr", "weight_decay"}
        of_base = {**base.options, **{name: group[name] for name in base_names & group.keys()}}
        if base in cases.FOREIGN:
            of_base["dtype"] = weight.dtype
        defaults = {"rho": method.options["rho"]}
        for name in self.subject.of_groups:
            defaults[name] = {"adaptive": True, "masked": True, "alpha": 0.7, "beta": 0.7, "eta": 0.01}.get(name)
            defaults[name] = {**method.options, **self.case.options}.get(name, defaults[name])
        return {**defaults, **{name: group[name] for name in defaults.keys() & group.keys()}}, of_base

    def gradients(self, step: Step, number: int) -> list[Tensor | None]:
        return self.script.gradients(self.n, number, step, self.params, [weight.frozen for weight in self.weights])

    # ---- events

    def run(self) -> None:
        random_state = torch.get_rng_state()
        for n, event in enumerate(self.case.events):
            self.n = n
            if isinstance(event, Step):
                self.step(event)
            else:
                getattr(self, f"change_{event.what}")(event)
            if self.is_over:
                break
        assert torch.equal(torch.get_rng_state(), random_state), "the global random numbers were touched"

    def step(self, step: Step) -> None:
        before = self.snapshot()
        places = [p.data_ptr() for p in self.params]
        closures = self.closures(self.params, step)
        error = self.raised_by(lambda: self.take(step, closures))
        assert [p.data_ptr() for p in self.params] == places, "a weight has moved"
        assert [p.requires_grad for p in self.params] == [not weight.frozen for weight in self.weights]
        raised = any(closure.raised for closure in closures)
        assert (error is not None) == raised, error
        number = step.fails[0] if step.fails else 0
        if raised and not (step.call == "validation" and number >= 2):
            self.check_undone(before, closures)
            return
        twins = self.closures(self.w, step)
        error = self.raised_by(lambda: self.take_by_oracle(step, twins))
        assert (error is not None) == raised, error
        if raised:  # a radius that could not be learned
            self.oracle.evaluations = before["counts"][0] + 2
        self.compare(step, before, closures, twins)

    def closures(self, params: list[Any], step: Step) -> list[Closure]:
        """A pass for training and one for validation come after the step proper, as numbers 2 and 3."""
        numbers = {"parts": [(0, 1), (2, 3)], "validation": [(0, 1, 2), (3,)]}.get(step.call, [(0, 1)])
        if step.call == "validation" and not self.looks_next():
            numbers[0] = (0, 2)
        return [Closure(self, params, step, those) for those in numbers]

    def looks_next(self) -> bool:
        return True  # the methods that learn a radius look in every step

    def raised_by(self, run: Any) -> BaseException | None:
        try:
            run()
        except (RuntimeError, KeyboardInterrupt, SystemExit) as error:
            if "in pass" not in str(error):
                raise
            return error
        return None

    def take(self, step: Step, closures: list[Closure]) -> None:
        opt, first = self.opt, closures[0]
        if step.call == "halves":
            first()
            try:
                if opt.first_step():
                    first()
            except BaseException:
                opt.restore()
                raise
            opt.second_step()
        elif step.call == "perturbed":
            with opt.perturbed():
                first()
            opt.step()
        elif step.call == "parts":
            opt.step(closures)
        elif step.call == "validation":
            opt.step(first, val_closure=closures[1])
        else:
            loss = opt.step(first)
            assert torch.equal(loss, self.script.loss(self.n, 0)), "not the loss of the first pass"

    def take_by_oracle(self, step: Step, closures: list[Closure]) -> None:
        if step.call == "validation":
            self.oracle.step(*closures)
        else:
            self.oracle.step(closures if self.subject.method.oracle in cases.MICRO else closures[0])

    def change_file(self, change: Change) -> None:
        params = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in self.params]
        other = self.make(params)
        buffer = io.BytesIO()
        torch.save(self.opt.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        self.go_on_with(params, other)

    def change_deepcopy(self, change: Change) -> None:
        self.go_on_with(*copy.deepcopy((self.params, self.opt)))

    def change_pickle(self, change: Change) -> None:
        self.go_on_with(*pickle.loads(pickle.dumps((self.params, self.opt))))

    def go_on_with(self, params: list[nn.Parameter], opt: Any) -> None:
        assert same_bits(values(params), values(self.params))
        assert same_tree(opt.state_dict(), self.opt.state_dict())
        self.params, self.opt = params, opt

    def change_lr(self, change: Change) -> None:
        self.opt.param_groups[change.group]["lr"] *= 0.5
        for i, weight in enumerate(self.weights):
            if weight.group == change.group:
                self.oracle.base.options[i]["lr"] *= 0.5

    def change_rho(self, change: Change) -> None:
        if self.case.subject.startswith("LETS"):  # it is learned
            return
        self.opt.param_groups[change.group][self.opt.key("rho")] *= 1.5
        for i, weight in enumerate(self.weights):
            if weight.group == change.group:
                self.oracle.rho[i] *= 1.5

    def change_restore(self, change: Change) -> None:
        """A step that is begun and given up; then there is nothing to give up."""
        before = self.snapshot()
        if "halves" in self.subject.calls:
            first = self.closures(self.params, Step())[0]
            first()
            if self.opt.first_step():
                first()
            self.opt.restore()
        self.opt.restore()
        self.check_unchanged(before)

    def change_group(self, change: Change) -> None:
        n = len(self.params)
        self.weights += change.weights
        self.groups.append(dict(change.group))
        new = [self.script.weight(n + i, weight) for i, weight in enumerate(change.weights)]
        self.opt.add_param_group({"params": new, **self.in_group(change.group)})
        self.params += new
        twins = [self.twin(p) for p in new]
        self.w = [*self.w, *twins]
        columns = [self.of_weight(weight, change.group) for weight in change.weights]
        of_method, of_base = columns[0]
        if "dtype" in of_base:
            of_base["dtype"] = [weight.dtype for weight in change.weights]
        if self.case.subject.startswith("LETS"):
            of_method["rho"] = self.oracle.radius
        self.oracle.add(twins, **of_method, **of_base)

    # ---- what must hold

    def snapshot(self) -> dict[str, Any]:
        return {
            "weights": [x.clone() for x in values(self.params)],
            "state": written(copy.deepcopy(self.opt.state_dict())),
            "counts": (self.opt.evaluations, self.opt.steps, self.opt.skips),
            "last_step": self.opt.last_step,
        }

    def check_unchanged(self, before: dict[str, Any]) -> None:
        after = self.snapshot()
        assert same_bits(after["weights"], before["weights"]), "weights are not as they were"
        assert after["counts"] == before["counts"]
        assert same_tree(after["state"], before["state"]), differences(after["state"], before["state"])

    def check_undone(self, before: dict[str, Any], closures: list[Closure]) -> None:
        """The step has failed."""
        self.check_unchanged(before)
        if len(closures) == 1:  # the gradients are those of the first pass, not copies
            for p, g in zip(self.params, closures[0].gave[0], strict=True):
                assert (p.grad is None) == (g is None or not p.requires_grad)
                assert p.grad is None or same_bits([p.grad], [g])

    def compare(self, step: Step, before: dict[str, Any], closures: list[Closure], twins: list[Closure]) -> None:
        opt, oracle = self.opt, self.oracle
        assert [len(c.seen) for c in closures] == [len(c.seen) for c in twins], "the passes are not the oracle's"
        assert (opt.evaluations, opt.skips, opt.steps) == (oracle.evaluations, oracle.skips, oracle.t)
        old = before["weights"]
        for ours, theirs in zip(closures, twins, strict=True):
            for number, a, b in zip(ours.numbers, ours.seen, theirs.seen, strict=False):
                self.check_weights(f"in pass {number}", a, b, old)
        with torch.no_grad():
            if not all(bool(x.isfinite().all()) for x in values([*self.params, *self.w])):
                # What 0 times inf is, or inf - inf, depends on how a formula is written.
                assert self.case.options["nonfinite"] == "ignore", "a gradient that is not finite got through"
                self.is_over = True
                return
            self.check_weights("after the step", values(self.params), values(self.w), old)
            skipped = opt.skips > before["counts"][2]
            self.check_what_stays(step, before, closures, skipped)
            for i, (p, w) in enumerate(zip(self.params, self.w, strict=True)):
                self.follow_state(i, p)
                w.data = p.detach().double().clone(memory_format=torch.contiguous_format)
            own = opt.state_dict()["samkern"]
            self.follow_cache(own["cache"])
            self.follow_mask()
            self.follow_radius()

    def check_what_stays(self, step: Step, before: dict[str, Any], closures: list[Closure], skipped: bool) -> None:
        """Without any gradient a weight and its state stay; all of them if the step was skipped."""
        now = written(self.opt.state_dict())
        proper = closures[:1] if step.call == "validation" else closures
        reached = {i for c in proper for row in c.gave[:2] for i, g in enumerate(row) if g is not None}
        for i, (a, b) in enumerate(zip(values(self.params), before["weights"], strict=True)):
            if skipped or i not in reached:
                assert same_bits([a], [b]), f"weight {i} has changed"
                assert same_tree(now["state"].get(i), before["state"]["state"].get(i)), f"state of {i} has changed"
        assert self.opt.last_step.skipped == (skipped or not reached)
        if skipped:
            ours, theirs = now["samkern"], before["state"]["samkern"]
            if ours["masks"].keys() != theirs["masks"].keys():  # weights that are new to it
                theirs = {**theirs, "masks": ours["masks"]}
            for key in (ours.keys() | theirs.keys()) - set(COUNTERS):
                assert same_tree(ours.get(key), theirs.get(key)), f"{key} has changed in a skipped step"

    def check_weights(self, where: str, ours: list[Tensor], theirs: list[Tensor], old: list[Tensor]) -> None:
        of_norms, places = self.eps_of_norms(), 2 if self.case.base in cases.FOREIGN else 1
        for i, (a, b, c) in enumerate(zip(ours, theirs, old, strict=True)):
            moved = (b - c.double()).abs().nan_to_num(0, 0, 0)
            eps = self.eps(a.dtype)
            allowed = places * eps * b.abs() + 4 * max(of_norms, eps) * largest(moved) + SMALLEST[a.dtype]
            self.check_close(f"weight {i} {where}", a, b, allowed)

    def check_close(self, what: str, ours: Tensor, theirs: Tensor, allowed: Tensor | float) -> None:
        a, b = ours.double(), theirs.double()
        good = ((a - b).abs() <= allowed) | (a == b) | (a.isnan() & b.isnan())
        assert bool(good.all()), f"{what}: {a[~good].tolist()[:4]} instead of {b[~good].tolist()[:4]}"

    def eps(self, dtype: torch.dtype) -> float:
        """Sums of a GPU are of products added in float32, also where a list has float64 beside other types."""
        return max(EPS[dtype], EPS[FP32]) if self.backend in ("cuda", "triton") else EPS[dtype]

    def eps_of_norms(self) -> float:
        """Norms are over all weights, whatever their types, and of what may have been kept in few bits."""
        if self.case.options.get("cache_dtype") == BF16:
            return EPS[BF16]
        types = {weight.dtype for weight in self.weights}
        if not self.goes_through_gradients:
            types = {FP64 if dtype == FP64 else FP32 for dtype in types}
        return max(self.eps(dtype) for dtype in types)

    def follow_state(self, i: int, p: nn.Parameter) -> None:
        ours, theirs = self.opt.state_dict()["state"].get(i, {}), self.oracle.base.state[i]
        for key in ours.keys() | theirs.keys():
            value, expected = ours.get(key), theirs.get(key)
            if key == "step":
                assert float(value or 0) == float(expected or 0), f"step of {i}: {value} instead of {expected}"
                continue
            if value is None and expected is None:
                continue
            # What has not been made yet is as good as zero.
            value = torch.zeros_like(expected) if value is None else value
            expected = torch.zeros_like(value) if expected is None else expected
            eps = max(self.eps_of_norms(), self.eps(p.dtype if self.goes_through_gradients else value.dtype))
            self.check_close(f"{key} of {i}", value, expected, 4 * eps * (largest(expected) + 1))
            theirs[key] = value.to(expected.dtype).clone(memory_format=torch.contiguous_format)

    @property
    def goes_through_gradients(self) -> bool:
        """Whether what the base receives may be rounded to the type of the weights on its way."""
        foreign, parts = self.case.base in cases.FOREIGN, self.subject.method.oracle in cases.MICRO
        return foreign or parts or self.case.options.get("components") is not None

    def follow_cache(self, cache: dict[int, Tensor]) -> None:
        kept = getattr(self.oracle, "g_v", getattr(self.oracle, "d", None))
        if kept is None:
            return
        for i, expected in enumerate(kept):
            ours = cache.get(i, torch.zeros(expected.shape))
            self.check_close(f"cache {i}", ours, expected, 8 * self.eps(ours.dtype) * (largest(expected) + 1))
            kept[i] = ours.double().clone(memory_format=torch.contiguous_format)

    def follow_mask(self) -> None:
        if not cases.is_masked(self.subject):
            return
        oracle, masks = self.oracle, self.opt.masks()
        there = [masks[i] if masks[i] is not None else torch.ones(self.w[i].shape) for i in oracle.chosen]
        ours = np.concatenate([np.zeros(0, dtype=bool), *(x.bool().flatten().cpu().numpy() for x in there)])
        theirs = np.ones(oracle.n, dtype=bool) if oracle.mask is None else oracle.mask
        assert np.array_equal(ours, theirs), f"mask: {np.flatnonzero(ours != theirs)} are different"

    def follow_radius(self) -> None:
        if not hasattr(self.oracle, "radius"):
            return
        ours, eps = float(self.opt.radius), max(self.eps(p.dtype) for p in self.params)
        assert math.isclose(ours, self.oracle.radius, rel_tol=8 * eps), f"radius {ours}, {self.oracle.radius}"
        self.oracle.radius = ours
        self.oracle.rho = [ours if rho > 0 else rho for rho in self.oracle.rho]


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def values(params: list[Any]) -> list[Tensor]:
    return [p.detach() for p in params]


def written(value: Any) -> Any:
    """Without tensors that are zero and what has only such: one that has not been made yet is as good."""
    if not isinstance(value, dict):
        return value
    kept = {key: written(x) for key, x in value.items() if not (isinstance(x, Tensor) and not bool(x.count_nonzero()))}
    return {key: x for key, x in kept.items() if x != {} or isinstance(key, str)}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    return [] if same_tree(a, b) else [f"{path}: {a} instead of {b}"]
