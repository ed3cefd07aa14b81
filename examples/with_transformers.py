"""LookSAM with the Trainer of Transformers: another Trainer, and the optimizer is passed to it. A tiny model made here."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import samkern
from samkern.integrations.transformers import SharpnessAwareTrainer

torch.manual_seed(0)
config = BertConfig(
    vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2
)
model = BertForSequenceClassification(config)
words = torch.randint(0, 20, (256, 8))
data = [{"input_ids": x, "labels": int(x[0] >= 10)} for x in words]  # the first word decides

opt = samkern.LookSAM(model.parameters(), torch.optim.AdamW, lr=5e-3, rho=0.05, k=5)
args = TrainingArguments(
    tempfile.mkdtemp(),
    num_train_epochs=5,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    max_grad_norm=1.0,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
result = SharpnessAwareTrainer(model, args, train_dataset=data, optimizers=(opt, None)).train()
print(f"{result.global_step} steps, {opt.evaluations} pairs, loss {result.training_loss:.4f}")
