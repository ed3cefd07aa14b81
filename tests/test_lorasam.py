"""LoRA-SAM: SAM with the factors alone perturbed, and all that is frozen left as it is."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, AdamW

import samkern
from samkern.lora import all_factors

from . import adapted
from .adapted import closure_for, frozen, make, own, train, trained
from .lists import FP32, same_bits

pytest.importorskip("peft", reason="peft is not installed: pip install peft")

KINDS = ["own", "gpt2", "llama"]


def factors_of(model):
    return [p for f in all_factors(model) for p in (f.a, f.b)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_equals_sam_with_the_factors_alone(kind, base):
    """Whatever else is trained is updated by the gradient that SAM takes there."""
    model, twin = make(kind), make(kind)
    opt = samkern.LoRASAM(model, base, rho=0.1, lr=1e-2)
    ours = factors_of(twin)
    rest = [p for p in twin.parameters() if p.requires_grad and not any(p is q for q in ours)]
    by_id = {id(q) for q in ours}
    in_order = [p for p in twin.parameters() if id(p) in by_id]
    groups = [{"params": in_order}, *([{"params": rest, "rho": 0.0}] if rest else [])]
    sam = samkern.SAM(groups, base, rho=0.1, lr=1e-2)
    before = frozen(model)
    assert train(model, opt, range(5)) == train(twin, sam, range(5))
    assert same_bits(trained(model), trained(twin))
    assert same_bits(frozen(model), before)
    assert opt.evaluations == 10


def test_one_norm_over_all_factors():
    model = own()
    opt = samkern.LoRASAM(model, SGD, rho=0.1, lr=0.1)
    closure_for(model, opt, 0)()
    before = {p: p.detach().clone() for p in model.parameters()}
    opt.first_step()
    moved = {p: (p.detach() - w).norm() for p, w in before.items()}
    opt.restore()
    ours = factors_of(model)
    assert float(torch.stack([moved[p] for p in ours]).norm()) == pytest.approx(0.1, rel=1e-6)
    assert all(moved[p] > 0 for p in ours)
    assert all(moved[p] == 0 for p in before if not any(p is q for q in ours))


def test_two_hundred_steps_leave_the_frozen_weights_as_they_are():
    model = own(FP32, sizes=(6, 5, 4))
    before, start = frozen(model), trained(model)
    train(model, samkern.LoRASAM(model, SGD, lr=1e-2), range(200))
    assert same_bits(frozen(model), before)
    assert not same_bits(trained(model), start)


def test_groups_keep_their_options():
    model = own()
    named = dict(model.named_parameters())
    factors = [p for name, p in named.items() if "lora_" in name]
    norms = [p for name, p in named.items() if p.requires_grad and "lora_" not in name]
    groups = [
        {"params": [*factors[:2], norms[0]], "lr": 0.1, "rho": 0.3},
        {"params": [*factors[2:], *norms[1:]], "weight_decay": 0.1},
    ]
    opt = samkern.LoRASAM(groups, SGD, model=model, lr=0.01)
    told = [(len(g["params"]), g["lr"], g["rho"], g["weight_decay"]) for g in opt.param_groups]
    assert told == [
        (2, 0.1, 0.3, 0),
        (4, 0.01, 0.05, 0.1),
        (1, 0.1, 0.0, 0),
        (5, 0.01, 0.0, 0.1),
    ]


def test_of_some_adapters_and_of_parameters_alone():
    model = own()
    f = all_factors(model)[0]
    adapter = samkern.Adapter(model[0].weight, f.a, f.b, f.scale)
    opt = samkern.LoRASAM(model, SGD, lr=0.1, adapters=[adapter])
    assert [(len(g["params"]), g["rho"]) for g in opt.param_groups] == [(2, 0.05), (10, 0.0)]
    named = samkern.LoRASAM(model.named_parameters(), SGD, lr=0.1, adapters=[adapter])
    assert [g["rho"] for g in named.param_groups] == [0.05, 0.0]
    alone = samkern.LoRASAM([f.a, f.b], SGD, lr=0.1)
    assert [g["rho"] for g in alone.param_groups] == [0.05]


def test_adapters_of_all_kinds():
    """SAM needs no merged weight: embeddings and DoRA are factors as others are."""
    model = adapted.language_model("gpt2", FP32, target_modules=["wte", "c_attn"], use_dora=False)
    assert len(all_factors(model)) == 3
    opt = samkern.LoRASAM(model, SGD, lr=0.1)
    assert [len(g["params"]) for g in opt.param_groups] == [6]
    dora = adapted.language_model("llama", FP32, use_dora=True)
    opt = samkern.LoRASAM(dora, SGD, lr=0.1)
    assert [(len(g["params"]), g["rho"]) for g in opt.param_groups] == [(16, 0.05), (8, 0.0)]  # magnitudes
    before = frozen(dora)
    train(dora, opt, range(2))
    assert same_bits(frozen(dora), before)


def test_a_ready_base():
    model = own()
    ours = factors_of(model)
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in ours)]
    opt = samkern.LoRASAM(model, SGD([{"params": rest}, {"params": ours}], lr=0.1), rho=0.2)
    assert [g["rho"] for g in opt.param_groups] == [0.0, 0.2]
    with pytest.raises(ValueError, match="group 0 of the base has factors and other parameters"):
        samkern.LoRASAM(model, SGD([*rest, *ours], lr=0.1))


@pytest.mark.parametrize("ready", [False, True])
def test_a_base_with_a_rho_of_its_own(ready):
    a, b, bias = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 4), (3, 2), (3,)))
    adapter = samkern.Adapter(torch.zeros(3, 4), a, b)
    groups = [{"params": [a, b]}, {"params": [bias]}]
    base = torch.optim.Adadelta(groups) if ready else torch.optim.Adadelta
    opt = samkern.LoRASAM(None if ready else [a, b, bias], base, rho=0.1, adapters=[adapter])
    assert [(group["rho"], group["sam_rho"]) for group in opt.param_groups] == [(0.9, 0.1), (0.9, 0.0)]


def test_what_is_refused():
    model = own()
    rest = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    for given, options, message in [
        (torch.nn.Linear(2, 2), {}, "model has no adapters"),
        (rest, {"model": model}, "no factor of an adapter"),
        (own().requires_grad_(False), {}, "requires a gradient"),
        (model, {"rho": -1.0}, "rho must be a finite number >= 0, got -1.0"),
        (model, {"adapters": []}, "no factor of an adapter"),
    ]:
        with pytest.raises(ValueError, match=message):
            samkern.LoRASAM(given, SGD, lr=0.1, **options)


def test_a_head_that_comes_later_is_not_perturbed():
    """As what is no factor from the start; with a radius of its own it is."""
    a, b, head, other = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 4), (3, 2), (5,), (6,)))
    opt = samkern.LoRASAM([a, b], torch.optim.SGD, lr=0.1, adapters=[samkern.Adapter(torch.zeros(3, 4), a, b)])
    opt.add_param_group({"params": head})
    opt.add_param_group({"params": [other], "rho": 0.2})
    assert [group["rho"] for group in opt.param_groups] == [0.05, 0.0, 0.2]
