"""The Trainer of Transformers with the optimizers of samkern."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from . import MissingPackageError
from .passes import MicroBatches, clip_by, reduce_with, sharpness_aware

try:
    from transformers import Trainer
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "transformers":
        raise
    raise MissingPackageError("transformers", "transformers") from None

__all__ = ["SharpnessAwareTrainer"]


class SharpnessAwareTrainer(Trainer):
    """``transformers.Trainer`` for optimizers of samkern; or a mixin before another one.

    ``SharpnessAwareTrainer(model, args, train_dataset=data, optimizers=(opt, scheduler))``, all else as in ``Trainer``. With
    ``optimizer_cls_and_kwargs=(samkern.SAM, {"base": torch.optim.AdamW, "lr": 1e-4, "rho": 0.05})`` it makes the optimizer
    itself, with its usual two groups, with weight decay and without. For other trainers:
    ``class MyTrainer(SharpnessAwareTrainer, Seq2SeqTrainer)``.

    The second pass comes after the last micro-batch of an accumulation, over all of them, with the same
    ``num_items_in_batch``. ``max_grad_norm`` of the arguments becomes that of an optimizer that has none: it clips what its
    base receives. Logs have the loss of the first pass, and as ``grad_norm`` that of the last gradient before clipping. With
    fp16, a step that is skipped moves the learning-rate scheduler on.

    Pass ``model=`` to the optimizer if the model has BatchNorm. Methods with passes of their own (a ``LearnedRadius``,
    ``share_rng=True``) raise.

    Raises:
        TypeError: the optimizer is none of samkern's.

    >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
    >>> sizes = {"vocab_size": 10, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **sizes))
    >>> opt = samkern.SAM(model.parameters(), torch.optim.AdamW, lr=1e-3, rho=0.05)
    >>> data = [{"input_ids": [i, i + 1], "labels": i % 2} for i in range(8)]
    >>> args = TrainingArguments(max_steps=2, gradient_accumulation_steps=2, report_to="none", save_strategy="no", use_cpu=True)
    >>> trainer = SharpnessAwareTrainer(model, args, train_dataset=data, optimizers=(opt, None))
    >>> trainer.train().global_step  # doctest: +ELLIPSIS
    {...}
    2
    >>> opt.steps, opt.evaluations
    (2, 4)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._micro_batches = MicroBatches()
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``Trainer``."""
        self._micro_batches.forget()  # of a run that ended within a step
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As in ``Trainer``; the last one before an optimizer step also takes the second pass."""
        opt = sharpness_aware(self.optimizer)
        clip_by(opt, self.args.max_grad_norm)
        reduce_with(opt, model)
        one_pass = super().training_step

        def evaluate(inputs: Any) -> Tensor:
            loss: Tensor = one_pass(model, inputs, num_items_in_batch)
            return loss

        loss: Tensor = self._micro_batches.first(opt, evaluate, inputs)
        if self.accelerator.sync_gradients:
            no_sync = functools.partial(self.accelerator.no_sync, model)
            self._micro_batches.second(opt, evaluate, self.accelerator.scaler, no_sync)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """The optimizer clips; the Trainer then takes the norm for its log."""
