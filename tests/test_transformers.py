"""The Trainer of Transformers takes the steps of a loop written out: bitwise, whatever it accumulates, clips or resumes."""

from __future__ import annotations

import pytest
import torch
from torch.optim import AdamW

import samkern

from .recipes import run_all_about

transformers = pytest.importorskip(
    "transformers", reason="Transformers is not installed: pip install samkern[transformers]"
)

from samkern.integrations.transformers import SharpnessAwareTrainer  # noqa: E402

BASE = {"lr": 1e-2, "weight_decay": 0.01}
METHODS = {
    "SAM": lambda p, **o: samkern.SAM(p, AdamW, rho=0.1, **BASE, **o),
    "LookSAM": lambda p, **o: samkern.LookSAM(p, AdamW, rho=0.1, k=3, **BASE, **o),
    "ARSAM": lambda p, **o: samkern.ARSAM(p, AdamW, rho=0.1, window=4, **BASE, **o),
    "MSAM": lambda p, **o: samkern.MSAM(p, AdamW, rho=0.1, **BASE, **o),
}
SIZES = {"vocab_size": 12, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_classifier(**options):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **{**NO_DROPOUT, **options}))


def make_language_model():
    """It divides its loss by the number of items of all micro-batches, which the Trainer counts."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=12,
        n_embd=8,
        n_head=2,
        n_layer=1,
        n_positions=8,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # by which the Trainer counts
    return model


def sentences(n, length):
    return torch.randint(0, 12, (n, length), generator=torch.Generator().manual_seed(n))


CLASSIFIED = [{"input_ids": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(sentences(28, 6))]
# Of some sentences fewer words count.
WORDS = [
    {"input_ids": x, "labels": torch.where(torch.arange(6) < 2 + i // 4 % 4, x, -100)}
    for i, x in enumerate(sentences(24, 6))
]


class InOrder(SharpnessAwareTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_for(model, opt, folder, *, data=CLASSIFIED, **options):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    rates = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 10)
    args = transformers.TrainingArguments(**{**arguments, **options})
    return InOrder(model, args, train_dataset=data, optimizers=(opt, rates))


def written_out(model, opt, *, data=CLASSIFIED, epochs=2, accumulate=1, batch=4, dtype=None):
    """The same without a Trainer. Returns the first losses."""
    rates = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 10)
    losses = []

    def sweep(batches):
        for inputs in batches:
            extra = {"num_items_in_batch": n_items(batches)} if model.accepts_loss_kwargs else {}
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = model(**inputs, **extra).loss
            loss = loss if extra else loss / len(batches)
            loss.backward()
            losses.append(loss.item())

    model.train()
    rows = [
        {name: torch.stack([x[name] for x in data[i : i + batch]]) for name in data[0]}
        for i in range(0, len(data), batch)
    ]
    for start in list(range(0, len(rows), accumulate)) * epochs:
        batches = rows[start : start + accumulate]
        if opt.perturbation.before_pass:
            with opt.perturbed():
                sweep(batches)
            opt.step()
        else:
            sweep(batches)
            if opt.first_step():
                kept, before = losses, len(losses)
                sweep(batches)
                del kept[before:]
            opt.second_step()
        rates.step()
        opt.zero_grad()
    return losses


def n_items(batches):
    return sum(inputs["labels"][:, 1:].ne(-100).sum() for inputs in batches)


def same(model, other):
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.fixture(autouse=True)
def _language_models_take_the_number_of_items(monkeypatch):
    monkeypatch.setattr(transformers.BertForSequenceClassification, "accepts_loss_kwargs", False, raising=False)
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "accepts_loss_kwargs", True, raising=False)


@pytest.mark.parametrize(("method", "accumulate"), [("SAM", 1), ("LookSAM", 3), ("ARSAM", 3), ("MSAM", 3)])
def test_a_training(method, accumulate, tmp_path):
    """Of 7 batches, so that an epoch ends with a step of one."""
    model, twin = make_classifier(), make_classifier()
    opt, other = METHODS[method](model.parameters()), METHODS[method](twin.parameters())
    result = trainer_for(model, opt, tmp_path, gradient_accumulation_steps=accumulate).train()
    losses = written_out(twin, other, accumulate=accumulate)
    assert same(model, twin)
    steps = 14 if accumulate == 1 else 6
    assert result.global_step == opt.steps == other.steps == steps
    assert opt.evaluations == other.evaluations
    assert result.training_loss == pytest.approx(sum(losses) / steps, rel=1e-6)  # of first passes


@pytest.mark.parametrize("method", ["SAM", "LookSAM"])
def test_words_are_weighed_alike_in_both_passes(method, tmp_path):
    """``num_items_in_batch``: of all micro-batches of a step, which then are one large batch."""
    model, twin, whole = (make_language_model() for _ in range(3))
    opts = [METHODS[method](net.parameters()) for net in (model, twin, whole)]
    trainer_for(model, opts[0], tmp_path, data=WORDS, gradient_accumulation_steps=3).train()
    written_out(twin, opts[1], data=WORDS, accumulate=3)
    assert same(model, twin)
    trainer_for(whole, opts[2], tmp_path, data=WORDS, per_device_train_batch_size=12).train()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert not torch.equal(model.transformer.wte.weight, make_language_model().transformer.wte.weight)


@pytest.mark.parametrize("method", ["LookSAM", "MSAM"])
def test_clipping_is_the_optimizers(method, tmp_path):
    """So that LookSAM keeps its part of an unclipped gradient."""
    model, twin = make_classifier(), make_classifier()
    opt, other = METHODS[method](model.parameters()), METHODS[method](twin.parameters(), max_grad_norm=0.05)
    trainer = trainer_for(model, opt, tmp_path, max_grad_norm=0.05, logging_strategy="steps", logging_steps=1)
    trainer.train()
    written_out(twin, other)
    assert same(model, twin)
    logged = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(logged) == 14
    assert float(logged[0]) > 0.05  # before clipping
    own = METHODS[method](make_classifier().parameters(), max_grad_norm=0.7)
    trainer_for(model, own, tmp_path, max_grad_norm=0.05, max_steps=1)
    assert own.max_grad_norm == 0.7


def test_bf16(tmp_path):
    model, twin = make_classifier(), make_classifier()
    trainer_for(model, METHODS["LookSAM"](model.parameters()), tmp_path, bf16=True).train()
    written_out(twin, METHODS["LookSAM"](twin.parameters()), dtype=torch.bfloat16)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not same(model, make_classifier())


@pytest.mark.parametrize("init_scale", [2.0**10, 2.0**127], ids=["", "overflow"])
def test_a_loss_scale(init_scale, tmp_path):
    """Trainer and Accelerate have no fp16 on a CPU; the loss scale that they have on a GPU works on float32 as well."""
    print("Accelerate gives no loss scale to a CPU: it is put in place, and gradients are float32")
    model, twin = make_classifier(), make_classifier()
    opt, other = METHODS["SAM"](model.parameters()), METHODS["SAM"](twin.parameters())
    trainer = trainer_for(model, opt, tmp_path, gradient_accumulation_steps=2, num_train_epochs=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3, backoff_factor=2.0**-20)
    trainer.accelerator.scaler = scaler
    trainer.train()
    if init_scale < 2.0**100:
        written_out(twin, other, accumulate=2, epochs=1)
        assert same(model, twin)
        assert opt.skips == 0
        assert torch.equal(opt.last_step.grad_norm, other.last_step.grad_norm)
        assert scaler.get_scale() == 2 * init_scale
    else:
        assert 0 < opt.skips < opt.steps
        assert scaler.get_scale() < init_scale
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["LookSAM", "ARSAM"])
def test_resuming_is_bit_exact(method, tmp_path):
    """From within an epoch, between two looks, with dropout."""
    drops = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    unbroken, broken = make_classifier(**drops), make_classifier(**drops)
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "gradient_accumulation_steps": 2}
    opt = METHODS[method](unbroken.parameters())
    trainer_for(unbroken, opt, tmp_path, **saving).train()
    checkpoint = tmp_path / "checkpoint-4"
    assert checkpoint.exists()
    with torch.no_grad():
        broken.classifier.weight.zero_()
    resumed = METHODS[method](broken.parameters())
    result = trainer_for(broken, resumed, tmp_path / "other", **saving).train(resume_from_checkpoint=str(checkpoint))
    assert result.global_step == resumed.steps == 8
    assert resumed.evaluations == opt.evaluations
    assert same(broken, unbroken)


def test_the_trainer_makes_the_optimizer(tmp_path):
    """With its usual groups: weight decay but for biases and norms."""
    model = make_classifier()
    made = {"base": AdamW, "lr": 1e-2, "rho": 0.1}
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        weight_decay=0.1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = SharpnessAwareTrainer(model, args, train_dataset=CLASSIFIED, optimizer_cls_and_kwargs=(samkern.SAM, made))
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert isinstance(opt, samkern.SAM)
    assert opt.evaluations == 4
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert opt.max_grad_norm == 1.0  # the Trainer's default


def test_a_mixin_before_another_trainer(tmp_path):
    class Weighed(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            return 0.0 * super().compute_loss(*args, **kwargs)

    class Both(SharpnessAwareTrainer, Weighed):
        pass

    model = make_classifier()
    opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=1.0)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", save_strategy="no", use_cpu=True
    )
    Both(model, args, train_dataset=CLASSIFIED, optimizers=(opt, None)).train()
    assert opt.steps == 1
    assert same(model, make_classifier())


def test_mistakes_say_what_to_do(tmp_path):
    model = make_classifier()
    with pytest.raises(TypeError, match="one of samkern's, got AcceleratedOptimizer: make it"):
        trainer_for(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path).train()
    with pytest.raises(RuntimeError, match="share_rng=True needs step"):
        trainer_for(model, METHODS["SAM"](model.parameters(), share_rng=True), tmp_path).train()
    plain = transformers.Trainer(
        model,
        trainer_for(model, METHODS["SAM"](model.parameters()), tmp_path).args,
        train_dataset=CLASSIFIED,
        optimizers=(METHODS["SAM"](model.parameters()), None),
    )
    with pytest.raises(TypeError, match=r"step\(\) needs a closure"):
        plain.train()
    assert same(model, make_classifier())


def test_what_is_written_of_it(tmp_path, monkeypatch, capsys):
    run_all_about("transformers", tmp_path, monkeypatch, capsys)
