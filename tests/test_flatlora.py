"""Flat-LoRA: noise on merged weights, which are never written; what its passes and its failures leave behind."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from torch.utils.checkpoint import checkpoint

import samkern
from bench.memory import peak_allocated
from samkern import lora
from samkern.lora import AdaptedWeight, Factors, adapted_weights

from . import adapted
from .adapted import closure_for, frozen, layers_of, loss_of, make, own, seen_by, train, trained
from .lists import BF16, FP32, FP64, same_bits, same_tree, seeded
from .oracles import bases
from .oracles import lora as oracle
from .problems import through_a_file

pytest.importorskip("peft", reason="peft is not installed: pip install peft")

T = 10
KINDS = ["own", "gpt2", "llama"]
BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9}, bases.Sgd),
    "Adam": (Adam, {"lr": 3e-3}, bases.Adam),
    "AdamW": (AdamW, {"lr": 3e-3, "weight_decay": 0.1}, bases.AdamW),
}


def flat(model, base=SGD, /, **options):
    return samkern.FlatLoRA(model, base, **{"sigma": 0.3, "lr": 0.05, "total_steps": T, **options})


def untouched(model):
    """Whether no layer computes with anything but its own weight."""
    return not any("forward" in vars(m) or "weight" in vars(m) for m in model.modules())


def merged_gradients(model, layers, weights, t):
    """Of the parameters that are trained, with ``weights`` in place of merged ones: by autograd alone."""
    names = {id(p): name for name, p in model.named_parameters()}
    replaced, silent = {}, {}
    for x, w in zip(layers, weights, strict=True):
        stored = w.T if x.transposed else w
        replaced[names[id(x.weight)]] = stored.to(x.weight.dtype)
        for f in x.factors():  # their product is in the weight already
            silent[names[id(f.b)]] = torch.zeros_like(f.b)
    return Replaced(model, {**replaced, **silent}), t


class Replaced(nn.Module):
    """``model`` with other parameters in place of some."""

    def __init__(self, model, others):
        super().__init__()
        self.model, self.others = [model], others

    def loss(self, t):
        model = self.model[0]
        x = adapted.inputs(model, t)
        if isinstance(model, nn.Sequential):
            out = torch.func.functional_call(model, self.others, (x,))
            return F.cross_entropy(out.double(), torch.arange(12) % 4)
        return torch.func.functional_call(model, self.others, (), {"input_ids": x, "labels": x}).loss.double()


# ---- what it computes


@pytest.mark.parametrize(("kind", "base"), [("own", "SGD"), ("own", "Adam"), ("gpt2", "AdamW"), ("llama", "SGD")])
def test_gradients_are_those_of_the_merged_noisy_weight(kind, base):
    """By an oracle that forms W + scale B A and adds noise of its own making, over steps with all of the ramp."""
    cls, options, rule = BASES[base]
    model, twin = make(kind), make(kind)
    opt = flat(model, cls, **options)
    layers = adapted_weights(twin)
    w = [p for p in twin.parameters() if p.requires_grad]
    judge = oracle.FlatLoRA(layers_of(twin), rule(w, **options), 0.3, T)
    for t in range(T + 2):
        train(model, opt, [t])
        judge.step(lambda noisy, t=t: merged_gradients(twin, layers, noisy, t)[0].loss(t))
        # Normal numbers are of float32; so is the arithmetic of Llama's norms.
        for a, b in zip(trained(model), trained(twin), strict=True):
            assert (a - b).norm() <= (3e-4 if kind == "llama" else 3e-6) * b.norm()
    assert untouched(model)
    assert same_bits(frozen(model), frozen(twin))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_that_of_the_oracle(kind):
    model = make(kind)
    opt = flat(model)
    clean = [w.clone() for w, _ in layers_of(model)]
    for t in range(4):
        with opt.perturbed():
            seen = seen_by(model)
            loss_of(model, t).backward()
        for x, w, eps in zip(seen, clean, oracle.noise(layers_of(model), 0.3, t, T), strict=True):
            assert torch.allclose(x - w, eps, rtol=3e-6, atol=1e-7 * float(w.abs().max()))
        opt.step()
    assert all(torch.equal(x, w) for x, w in zip(seen_by(model), clean, strict=True))


@pytest.mark.parametrize("d_in", [1 << 12, 1 << 14])
def test_relative_noise_of_rows_is_sigma_at_any_width(d_in):
    layer = adapted.LoRALinear(nn.Linear(d_in, 8), rank=2)
    layer.lora_B.data.normal_(generator=seeded(1))
    layer.weight.data *= torch.logspace(-3, 3, 8)[:, None]
    opt = flat(layer, sigma=0.05, total_steps=1)
    opt._t = 1
    with opt.perturbed():
        kept, layer.lora_B.data = layer.lora_B.data, torch.zeros_like(layer.lora_B)
        seen = layer(torch.eye(1 << 12, d_in)).T - layer.bias[:, None]
        layer.lora_B.data = kept
    noise = (seen - layer.weight[:, : 1 << 12]).double()
    merged = oracle.merged(layers_of(layer)[0])
    share = noise.square().mean(1).sqrt() * math.sqrt(d_in) / merged.norm(dim=1)
    assert ((share / 0.05 - 1).abs() < 5 / math.sqrt(2 * 4096)).all()


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_row_norms_without_the_product(dtype, transposed, monkeypatch):
    """As of the product that is formed; of several adapters, in chunks, and where W and the product cancel."""
    monkeypatch.setattr(lora, "_CHUNK", 100)
    w = torch.randn(24, 31, generator=seeded(0))
    factors = [
        Factors("", torch.randn(r, 31, generator=seeded(r)), torch.randn(24, r, generator=seeded(9 + r)), scale)
        for r, scale in ((2, 0.7), (3, -1.3))
    ]
    layer = nn.Linear(31, 24, bias=False).requires_grad_(False)
    for cancels in (False, True):
        product = sum(f.scale * f.b.double() @ f.a.double() for f in factors)
        stored = (-product if cancels else w).to(dtype)
        layer.weight.data = stored.T.contiguous() if transposed else stored
        adapted_weight = AdaptedWeight("", [(layer, "weight")], transposed, factors=factors)
        norms = adapted_weight.row_norms(factors)
        expected = oracle.merged((stored, [(f.a, f.b, f.scale) for f in factors])).norm(dim=1)
        assert norms.dtype == FP64
        error = 1e-12 if dtype == FP64 else 1e-6
        # What cancels is lost below the square root of the error of the squares.
        assert torch.allclose(
            norms, expected, rtol=error, atol=math.sqrt(error) * float(product.norm(dim=1).max()) * cancels
        )
        assert (norms >= 0).all()
        assert same_bits([norms], [adapted_weight.row_norms(factors)])
    assert torch.allclose(adapted_weight.row_norms([]), stored.double().norm(dim=1), rtol=1e-12)


def test_row_norms_follow_a_weight_that_changes():
    model = own()
    x = adapted_weights(model)[0]
    x.row_norms(x.factors())
    for change in (lambda w: w.mul_(3), lambda w: setattr(w, "data", torch.randn_like(w))):
        with torch.no_grad():
            change(x.weight)
        assert torch.allclose(x.row_norms(x.factors()), oracle.merged(layers_of(model)[0]).detach().norm(dim=1))


def test_the_ramp():
    opt = flat(own(), sigma=0.2, total_steps=4)
    ramp = [opt.perturbation.sigma_at(t, 0.2) for t in range(7)]
    assert ramp == pytest.approx([0, 0.1 * (1 - math.sqrt(0.5)), 0.1, 0.1 * (1 + math.sqrt(0.5)), 0.2, 0.2, 0.2])


@pytest.mark.parametrize("kind", ["own", "gpt2"])
def test_without_noise_it_is_the_base(kind):
    """In the first step, and with sigma = 0 in all, bit by bit."""
    runs = {}
    for sigma in (0.0, 0.3):
        model, plain = make(kind, FP32), make(kind, FP32)
        opt = flat(model, AdamW, sigma=sigma, lr=1e-2)
        base = samkern.SharpnessAware(
            [p for p in plain.parameters() if p.requires_grad], AdamW, lr=1e-2, schedule=samkern.optim.Bernoulli(p=0.0)
        )
        runs[sigma] = []
        for t in range(3):
            train(model, opt, [t])
            train(plain, base, [t])
            runs[sigma].append(same_bits(trained(model), trained(plain)))
    assert runs == {0.0: [True] * 3, 0.3: [True, False, False]}


@pytest.mark.takes(4)
def test_a_thousand_steps_leave_the_frozen_weights_as_they_are():
    model = own(FP32, sizes=(6, 5, 4))
    before, start = frozen(model), trained(model)
    opt = flat(model, AdamW, lr=1e-3, total_steps=500)
    train(model, opt, range(1000))
    assert same_bits(frozen(model), before)
    assert not same_bits(trained(model), start)
    assert opt.evaluations == 1000
    assert opt.skips == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_frozen_weights_of_peft_stay(kind):
    model = make(kind, FP32)
    before = frozen(model)
    train(model, flat(model, AdamW, lr=1e-3), range(8))
    assert same_bits(frozen(model), before)
    assert untouched(model)


def test_several_adapters_add_up():
    """Those of peft that are active; and adapters that are named one by one."""
    model = make("llama")
    model.add_adapter("second", adapted.lora_config("llama", lora_alpha=2))
    adapted.started(model)
    model.base_model.set_adapter(["default", "second"])
    opt = flat(model, total_steps=1)
    opt._t = 1
    assert all(len(factors) == 2 for _, factors in layers_of(model))
    with opt.perturbed():
        seen = seen_by(model)
    eps = oracle.noise(layers_of(model), 0.3, 1, 1)
    for x, (w, _), e in zip(seen, layers_of(model), eps, strict=True):
        assert torch.allclose(x - w, e, rtol=1e-5, atol=1e-7)
    model.base_model.set_adapter("second")
    with opt.perturbed():
        assert all(len(factors) == 1 for _, factors in layers_of(model))
        other = seen_by(model)
    assert not torch.allclose(other[0], seen[0])


@pytest.mark.parametrize("kind", KINDS)
def test_named_adapters_are_those_that_are_found(kind):
    model, twin = make(kind, FP32), make(kind, FP32)
    named = [
        samkern.Adapter(x.weight, f.a, f.b, f.scale, x.transposed) for x in adapted_weights(twin) for f in x.factors()
    ]
    params = [p for p in twin.parameters() if p.requires_grad]
    train(model, flat(model), range(4))
    train(twin, flat(params, model=twin, adapters=named), range(4))
    assert same_bits(trained(model), trained(twin))
    assert not same_bits(trained(model), trained(make(kind, FP32)))


def test_named_adapters_of_one_weight_add_up():
    model = own()
    layer, first = model[0], adapted_weights(model)[0].factors()[0]
    half = [samkern.Adapter(layer.weight, first.a, first.b, first.scale / 2)] * 2
    opt, other = flat(model, adapters=half, total_steps=1), flat(model, total_steps=1)
    opt._t = other._t = 1
    with opt.perturbed():
        seen = seen_by(model)
    with other.perturbed():
        expected = seen_by(model)
    assert torch.allclose(seen[0], expected[0], rtol=1e-12)
    assert torch.equal(seen[1], model[3].weight)  # not named


def test_sigma_of_a_group_is_that_of_its_layers():
    model = own()
    first, second, third = (model[i] for i in (0, 3, 6))
    groups = [
        {"params": [first.lora_A, first.lora_B], "sigma": 0.1},
        {"params": [second.lora_A, second.lora_B], "sigma": 0.0},
    ]
    opt = flat(groups, model=model, total_steps=1)
    opt._t = 1
    with opt.perturbed():
        seen = seen_by(model)
    eps = oracle.noise(layers_of(model), 0.1, 1, 1)
    assert torch.allclose(seen[0] - first.weight, eps[0], rtol=1e-5, atol=1e-8)
    assert torch.equal(seen[1], second.weight)
    assert torch.equal(seen[2], third.weight)  # its factors are in no group


# ---- how it is called


@pytest.mark.parametrize("base", BASES)
def test_blocks_are_the_closure(base):
    cls, options, _ = BASES[base]
    model, twin = own(FP32), own(FP32)
    opt, other = flat(model, cls, **options), flat(twin, cls, **options)
    for t in range(4):
        train(model, opt, [t])
        other.zero_grad()
        with other.perturbed():
            assert untouched(twin) == (t == 0)
            loss_of(twin, t).backward()
        assert untouched(twin)
        other.step()
    assert same_bits(trained(model), trained(twin))
    assert opt.evaluations == other.evaluations == 4


def test_a_base_with_a_step_of_its_own_and_one_that_is_ready():
    model, twin, third = own(FP32), own(FP32), own(FP32)
    train(model, flat(model, torch.optim.NAdam, lr=1e-2), range(3))
    ready = torch.optim.NAdam([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    train(twin, samkern.FlatLoRA(twin, ready, 0.3, total_steps=T), range(3))
    assert same_bits(trained(model), trained(twin))
    train(third, flat(third, lr=1e-2), range(3))
    assert not same_bits(trained(model), trained(third))


def test_draws_closures_and_blocks_have_noise_of_their_own():
    models = [own() for _ in range(4)]
    draws = flat(models[0], draws=3)
    by_closures, by_blocks = flat(models[1]), flat(models[2])
    twin = models[3]
    judge = oracle.FlatLoRA(layers_of(twin), bases.Sgd([p for p in twin.parameters() if p.requires_grad], 0.05), 0.3, T)
    layers = adapted_weights(twin)
    for t in range(4):
        draws.step(closure_for(models[0], draws, t))
        by_closures.step([closure_for(models[1], by_closures, t)] * 3)
        by_blocks.zero_grad()
        for _ in range(3):
            with by_blocks.perturbed():
                (loss_of(models[2], t) / 3).backward()
        by_blocks.step()
        judge.step(*[lambda noisy, t=t: merged_gradients(twin, layers, noisy, t)[0].loss(t)] * 3)
    assert (draws.evaluations, by_closures.evaluations) == (12, 4)
    for other in models[:3]:
        for a, b in zip(trained(other), trained(twin), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_several_forwards_in_a_pass_and_a_backward_after_it():
    """All with the noise of the pass: the gradient of a sum is the sum of gradients."""
    model = own()
    opt = flat(model, total_steps=1)
    opt._t = 1
    params = [p for p in model.parameters() if p.requires_grad]

    def gradients(*ts):
        return torch.autograd.grad(sum(loss_of(model, t) for t in ts), params)

    with opt.perturbed():
        together, one, other = gradients(1, 2), gradients(1), gradients(2)
        late = loss_of(model, 1)
    assert untouched(model)
    clean = gradients(1)
    assert all(torch.allclose(a, b + c, rtol=1e-10) for a, b, c in zip(together, one, other, strict=True))
    assert same_bits(list(torch.autograd.grad(late, params)), list(one))
    assert not torch.allclose(clean[0], one[0])


def test_a_second_derivative_is_refused_rather_than_wrong():
    model = own()
    opt = flat(model, total_steps=1)
    opt._t = 1
    params = [p for p in model.parameters() if p.requires_grad]
    with opt.perturbed():
        gradients = torch.autograd.grad(loss_of(model, 1), params, create_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(g.square().sum() for g in gradients).backward()


# ---- memory, autocast, checkpoints


def test_no_more_than_one_layer_is_held():
    """Beside a plain pass: the scratch and what making noise takes, at any depth."""

    def extra(depth, noisy):
        model = adapted.started(nn.Sequential(*[adapted.LoRALinear(nn.Linear(96, 96), rank=2) for _ in range(depth)]))
        opt = flat(model, total_steps=1)
        opt._t = 1

        def run():
            if noisy:
                with opt.perturbed():
                    model(torch.ones(2, 96)).sum().backward()
            else:
                model(torch.ones(2, 96)).sum().backward()

        run()  # gradients are there, and the scratch
        opt.restore()
        return peak_allocated(run, torch.device("cpu"))

    weight = 96 * 96 * 4
    grows = [extra(12, noisy) - extra(4, noisy) for noisy in (False, True)]
    assert grows[1] - grows[0] < weight, "eight more layers hold no more weights"


def test_the_scratch_is_as_large_as_the_largest():
    model = own(FP32)
    opt = flat(model)
    train(model, opt, range(3))
    assert [x.numel() for x in opt.perturbation.scratch] == [80]
    without = own(FP32)
    plain = samkern.MSAM([p for p in without.parameters() if p.requires_grad], SGD, lr=0.1, momentum=0.9, rho=0.0)
    other = flat(own(FP32))
    assert other.memory(peak=True).other - other.memory().other == 80 * 4
    train(without, plain, range(3))
    memory = opt.memory()
    assert memory.parameters == plain.memory().parameters
    assert memory.saved == 0
    opt.perturbation._scratch.buffers.clear()
    assert memory.other - opt.memory().other == 80 * 4


@pytest.mark.parametrize("kind", ["own", "gpt2"])
def test_autocast(kind):
    """The scratch is of autocast's dtype, so that no converted copy is kept; gradients are those of such noisy weights."""
    model = make(kind, FP32)
    opt = flat(model, total_steps=1)
    opt._t = 1
    with opt.perturbed():
        noisy = seen_by(model)
        with torch.autocast("cpu", BF16):
            loss = loss_of(model, 1)
        opt.zero_grad()
        loss.backward()
    assert {x.dtype for x in opt.perturbation.scratch} == {FP32, BF16}  # the first of seen_by
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    merged = adapted_weights(model)
    with torch.no_grad():
        for x, w in zip(merged, noisy, strict=True):
            x.weight.copy_(w.T if x.transposed else w)
    with torch.autocast("cpu", BF16):
        loss = loss_of(model, 1)
    opt.zero_grad()
    loss.backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    # Noise rounds once, to bfloat16; what seen_by sees has been rounded to float32 before.
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 2e-3 * b.norm()


def test_autocast_alone_holds_a_scratch_of_its_dtype():
    model = own(FP32)
    opt = flat(model)
    for _ in range(2):
        with opt.perturbed(), torch.autocast("cpu", BF16):
            loss_of(model, 1).backward()
        opt.step()
    assert [x.dtype for x in opt.perturbation.scratch] == [BF16]


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant else x  # else nothing in the block has a gradient
        for i in range(0, len(self.model), 3):
            x = checkpoint(self.model[i : i + 3], x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model, twin = own(FP32), own(FP32)
    opt, other = flat(model), flat(twin)
    wrapped = Checkpointed(model, reentrant)
    for t in range(4):
        x, y = adapted.inputs(twin, t), torch.arange(12) % 4
        opt.zero_grad()
        with opt.perturbed():
            F.cross_entropy(wrapped(x.clone()), y).backward()
        opt.step()
        other.zero_grad()
        with other.perturbed():
            F.cross_entropy(twin(x.clone()), y).backward()
        other.step()
    assert same_bits(trained(model), trained(twin))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_gradient_checkpointing_of_transformers(kind, reentrant):
    model, twin = make(kind, FP32), make(kind, FP32)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train(), twin.train()
    train(model, flat(model), range(3))
    train(twin, flat(twin), range(3))
    assert same_bits(trained(model), trained(twin))


def test_hooks_that_are_there_get_what_is_not_a_noisy_weight():
    model = own(FP32)
    opt = flat(model, total_steps=1)
    opt._t = 1
    packed, unpacked = [], []

    def pack(x):
        packed.append(tuple(x.shape))
        return x.clone()

    def unpack(x):
        unpacked.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        plain = loss_of(model, 1)
    expected = sorted(packed)
    plain.backward()
    packed.clear(), unpacked.clear()
    with opt.perturbed(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss_of(model, 1).backward()
    weights = [shape for x in adapted_weights(model)[1:] for shape in [tuple(x.weight.shape)]]
    for shape in weights:  # of the first layer none is kept: its input has no gradient
        expected.remove(shape if shape in expected else shape[::-1])
    assert sorted(packed) == expected
    assert sorted(unpacked) == expected


def test_a_compiled_model_computes_with_noise_and_compiles_nothing_anew():
    torch._dynamo.reset()
    model, twin = own(FP32), own(FP32)
    compiled = torch.compile(model, backend="aot_eager")
    opt, other = flat(compiled), flat(twin)
    for t in range(5):
        with torch.compiler.set_stance("fail_on_recompile" if t > 2 else "default"):
            x = adapted.inputs(twin, t)
            for its_opt, run in ((opt, compiled), (other, twin)):
                its_opt.zero_grad()
                with its_opt.perturbed():
                    run(x).square().sum().backward()
                its_opt.step()
                with torch.no_grad():
                    run(x)
    for a, b in zip(trained(model), trained(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- what goes wrong


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["closure", "layer", "block"])
def test_an_exception_leaves_nothing_behind(error, where, monkeypatch):
    model, twin = own(FP32), own(FP32)
    opt, other = flat(model, AdamW, lr=1e-2), flat(twin, AdamW, lr=1e-2)
    train(model, opt, range(3)), train(twin, other, range(3))
    before = trained(model), frozen(model), copy.deepcopy(opt.state_dict())

    def failing(*_):
        raise error

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 3)
        loss.backward()
        failing()

    with monkeypatch.context() as patch:
        if where == "layer":
            patch.setattr(adapted.LoRALinear, "forward", failing)
        with pytest.raises(type(error)):
            if where == "block":
                with opt.perturbed():
                    closure()
            else:
                opt.step(closure)
    assert untouched(model)
    assert same_bits(before[0], trained(model))
    assert same_bits(before[1], frozen(model))
    assert same_tree(before[2], opt.state_dict())
    train(model, opt, range(3, 6)), train(twin, other, range(3, 6))
    assert same_bits(trained(model), trained(twin))


def test_a_gradient_that_is_not_finite_skips_the_step():
    model = own(FP32)
    opt = flat(model, AdamW, lr=1e-2)
    train(model, opt, range(2))
    before = trained(model)

    def closure():
        loss = closure_for(model, opt, 2)()
        model[0].lora_A.grad[0, 0] = math.nan
        return loss

    opt.step(closure)
    assert same_bits(trained(model), before)
    assert opt.skips == 1


def test_grad_scaler():
    """A power of two changes no bit; an overflow skips the step and lowers the scale once."""
    model, twin = own(FP32), own(FP32)
    opt, other = flat(model), flat(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(3):
        train(model, opt, [t])

        def closure(t=t):
            other.zero_grad()
            loss = loss_of(twin, t).float()
            scaler.scale(loss).backward()
            return loss

        other.step(closure, scaler=scaler)
        scaler.update()
    for a, b in zip(trained(model), trained(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)
    before = trained(twin)

    def overflowing():
        loss = closure()
        twin[0].lora_A.grad.fill_(math.inf)
        return loss

    other.step(overflowing, scaler=scaler)
    scaler.update()
    assert same_bits(trained(twin), before)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize(
    ("how", "kind"), [("deepcopy", "own"), ("deepcopy", "gpt2"), ("pickle", "own"), ("file", "own"), ("file", "gpt2")]
)
def test_resuming_is_bit_exact(how, kind):
    model = make(kind, FP32)
    opt = flat(model, AdamW, lr=1e-2, seed=5)
    train(model, opt, range(4))
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, opt))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, opt)))
    else:
        twin = make(kind, FP32, seed=1)
        other = flat(twin, AdamW, lr=1e-2, seed=6)
        train(twin, other, range(2))
        twin.load_state_dict(through_a_file(model.state_dict()))
        other.load_state_dict(through_a_file(opt.state_dict()))
    assert train(model, opt, range(4, 8)) == train(twin, other, range(4, 8))
    assert same_bits(trained(model), trained(twin))
    assert not any(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_global_generators_are_left_alone():
    model = own(FP32)
    opt = flat(model)
    before = torch.get_rng_state()
    train(model, opt, range(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_differ():
    runs = []
    for seed in (0, 0, 1):
        model = own(FP32)
        train(model, flat(model, seed=seed), range(4))
        runs.append(trained(model))
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])


def embedded():
    class Adapted(nn.Embedding):
        scaling = 1.0

        def __init__(self):
            super().__init__(4, 3)
            self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
            self.lora_embedding_A = {"default": torch.zeros(2, 4)}
            self.lora_embedding_B = {"default": torch.zeros(3, 2)}

    return Adapted()


def changed(change):
    model = own()
    change(model[0])
    return model


REFUSED = {
    "no adapters": (lambda: nn.Linear(3, 3), ValueError, "model has no adapters"),
    "an embedding": (lambda: nn.Sequential(embedded()), TypeError, "linear layers; name those"),
    "an embedding of peft": (
        lambda: adapted.language_model("gpt2", target_modules=["wte"]),
        TypeError,
        "weights of linear layers",
    ),
    "DoRA": (lambda: adapted.language_model("llama", use_dora=True), TypeError, "use_dora=False"),
    "quantised": (
        lambda: changed(lambda x: setattr(x, "weight", nn.Parameter(x.weight.to(torch.uint8), requires_grad=False))),
        TypeError,
        "without quantisation",
    ),
    "a trained weight": (lambda: changed(lambda x: x.weight.requires_grad_()), ValueError, "trained itself"),
    "other shapes": (
        lambda: changed(lambda x: setattr(x, "lora_A", nn.Parameter(torch.zeros(2, 5)))),
        ValueError,
        "must have the shape of the weight",
    ),
    "no matrix": (
        lambda: changed(lambda x: setattr(x, "weight", nn.Parameter(torch.zeros(3, 2, 2), requires_grad=False))),
        TypeError,
        "got one of shape",
    ),
    "on another device": (
        lambda: changed(lambda x: setattr(x, "weight", nn.Parameter(x.weight.to("meta"), requires_grad=False))),
        ValueError,
        "without offloading",
    ),
    "nothing to train": (lambda: own().requires_grad_(False), ValueError, "adapters are trained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    model, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        flat(model())


def test_options_that_are_refused():
    model = own()
    params = [p for p in model.parameters() if p.requires_grad]
    for options, error, message in [
        ({"sigma": -0.1}, ValueError, "sigma must be a finite number >= 0, got -0.1"),
        ({"total_steps": None}, ValueError, "total_steps must be an integer >= 1, got None"),
        ({"draws": 0}, ValueError, "draws must be"),
        ({"seed": 1.5}, ValueError, "seed must be an integer >= 0, got 1.5"),
        ({"adapters": []}, ValueError, "has no adapters"),
        ({"adapters": [params[0]]}, TypeError, "must be a samkern.Adapter"),
        ({"mask": samkern.optim.FisherMask(fisher="batch")}, ValueError, "mask= chooses entries"),
        ({"schedule": samkern.optim.GradientNorm(10)}, ValueError, "climbs before there is one"),
    ]:
        with pytest.raises(error, match=message):
            flat(model, **options)
    stranger = samkern.Adapter(torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="no parameter of model"):
        flat(model, adapters=[stranger])
    with pytest.raises(TypeError, match="model= must be the module"):
        flat(params)
    with pytest.raises(ValueError, match="another one"):
        flat(model, model=own())
    with pytest.raises(ValueError, match="must have the shape of the weight"):
        samkern.Adapter(torch.zeros(3, 4), torch.zeros(2, 3), torch.zeros(4, 2))
    assert samkern.Adapter(torch.zeros(3, 4), torch.zeros(2, 3), torch.zeros(4, 2), fan_in_fan_out=True).scale == 1


def test_merged_and_disabled_adapters_are_refused_when_a_pass_begins():
    model = make("llama", FP32)
    opt = flat(model, total_steps=1)
    train(model, opt, range(2))
    before = trained(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        opt.step(closure_for(model, opt, 2))
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        opt.step(closure_for(model, opt, 2))
    assert untouched(model)
    assert same_bits(trained(model), before)
    train(model, opt, [2])
    assert opt.steps == 3


def test_half_precision_weights():
    model = own(FP32).to(BF16)
    before = frozen(model)
    opt = flat(model, lr=0.1, total_steps=2)
    losses = train(model, opt, range(6))
    assert all(map(math.isfinite, losses))
    assert same_bits(frozen(model), before)
    assert [x.dtype for x in opt.perturbation.scratch] == [BF16]


def test_it_tells_what_it_does():
    assert "sigma = 0.3, W + scale B A of their layers" in flat(own()).explain()
