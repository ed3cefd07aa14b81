"""Lightning with the optimizers of samkern, in automatic and in manual optimization."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.amp.grad_scaler import GradScaler

from ..optim import SharpnessAware
from . import MissingPackageError
from .passes import MicroBatches, clip_by, reduce_with, sharpness_aware

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.core.optimizer import LightningOptimizer
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lightning":
        raise
    raise MissingPackageError("lightning", "lightning") from None

__all__ = ["SharpnessAwareModule"]

# What would keep the state of a step on Lightning's wrapper, which inherits our methods, if it were called there.
_OF_THE_OPTIMIZER = ("restore", "perturbed", "first_pass", "refresh_mask", "load_state_dict", "add_param_group")


class SharpnessAwareModule(LightningModule):
    """A ``LightningModule`` whose steps are taken by an optimizer of samkern; or a mixin before another module.

    ``class Net(SharpnessAwareModule)`` or ``class Net(SharpnessAwareModule, MyModule)``, whose ``configure_optimizers``
    returns ``samkern.SAM(self.parameters(), torch.optim.SGD, lr=0.1, rho=0.05, model=self)``, say. Precision ("16-mixed" too),
    ``accumulate_grad_batches``, schedulers, callbacks and checkpoints are the Trainer's.

    In automatic optimization the second pass runs ``training_step`` again, for all micro-batches of the step. What
    it logs by ``self.log`` is dropped; metrics that it updates itself should look at ``self.in_second_pass``. Hooks and
    callbacks around ``backward`` run in both passes, ``on_before_optimizer_step`` once, with the last gradients (in
    "16-mixed" they are scaled). ``gradient_clip_val`` becomes the ``max_grad_norm`` of an optimizer that has none.

    In manual optimization ``opt = self.optimizers()`` has ``first_step()``, ``second_step()`` and ``perturbed()`` as without
    Lightning, and they count steps and take the loss scale into account::

        self.manual_backward(self.loss(batch))
        if opt.first_step():
            self.manual_backward(self.loss(batch))
        opt.second_step(zero_grad=True)

    Raises:
        TypeError: the optimizer is none of samkern's.
        RuntimeError: ``training_step`` takes a ``dataloader_iter``, or ``on_train_batch_start`` was overridden without
            calling ``super()``; ``MSAM`` accumulates gradients in automatic optimization.
        ValueError: ``gradient_clip_algorithm="value"`` with a method that mixes gradients.

    >>> from lightning.pytorch import Trainer
    >>> class Net(SharpnessAwareModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(2, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         return self.linear(batch).square().mean()
    ...     def configure_optimizers(self):
    ...         return samkern.SAM(self.parameters(), torch.optim.SGD, lr=0.1, rho=0.05, model=self)
    >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    >>> trainer = Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, **quiet)
    >>> trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(32, 2), batch_size=8))
    >>> trainer.optimizers[0].steps, trainer.optimizers[0].evaluations
    (2, 4)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._micro_batches = MicroBatches()
        self._in_second_pass = False

    @property
    def in_second_pass(self) -> bool:
        """Whether ``training_step`` runs for the second time with a batch, at perturbed weights."""
        return self._in_second_pass

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As in Lightning; in second passes nothing is logged."""
        if not self._in_second_pass:
            super().log(*args, **kwargs)

    # ---- automatic optimization

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Notes the batch, for the second pass."""
        if self.automatic_optimization:
            if batch_idx % self.trainer.accumulate_grad_batches == 0:
                self._micro_batches.forget()  # of a step that was not taken
            self._micro_batches.add((batch, batch_idx))
        decision: int | None = super().on_train_batch_start(batch, batch_idx)
        return decision

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Runs the last first pass and all second ones, and then Lightning's own step with their gradients."""
        opt = sharpness_aware(optimizer)
        reduce_with(opt, self.trainer.strategy.model)
        self._check(opt, batch_idx)
        try:
            with opt.perturbed() if opt.perturbation.before_pass else opt.first_pass():
                loss = optimizer_closure()
            if loss is None:  # training_step asks for no step
                opt.restore()
                self._micro_batches.forget()
                return
            again = functools.partial(self._evaluate_again, opt)
            with self._second_pass():
                self._micro_batches.second(opt, again, self._scaler, self._no_sync)
            with _ends_by_step(opt):
                LightningOptimizer.step(optimizer, lambda: loss)
        except BaseException:
            opt.restore()
            self._micro_batches.forget()
            raise

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Hands the Trainer's ``gradient_clip_val`` to the optimizer, which clips what its base receives."""
        opt = sharpness_aware(optimizer)
        if gradient_clip_algorithm != "value":
            clip_by(opt, gradient_clip_val)
        elif opt.reuse is not None:
            raise ValueError(
                f"gradient_clip_algorithm='value' would change one of the gradients that {type(opt.reuse).__name__} mixes: "
                "clip by 'norm', which the optimizer does itself"
            )
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _check(self, opt: SharpnessAware, batch_idx: int) -> None:
        noted = self._micro_batches.last
        if noted is None or noted[1] != batch_idx:
            raise RuntimeError(
                "the second pass needs the batches of the first: call super().on_train_batch_start(batch, batch_idx) where "
                "you override it"
            )
        if "dataloader_iter" in inspect.signature(self.training_step).parameters:
            raise RuntimeError(
                "training_step(dataloader_iter) cannot run twice on one batch: take (batch, batch_idx), or optimize manually"
            )
        if opt.perturbation.before_pass and self.trainer.accumulate_grad_batches > 1:
            raise RuntimeError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} does not go with {type(opt).__name__}, "
                "which climbs before each pass: optimize manually, with opt.perturbed() around each micro-batch"
            )

    def _evaluate_again(self, opt: SharpnessAware, noted: tuple[Any, int]) -> None:
        """What Lightning's closure does with a micro-batch, but for its progress and its result."""
        strategy = self.trainer.strategy
        takes_index = len(inspect.signature(self.training_step).parameters) > 1
        output = strategy.training_step(*(noted if takes_index else noted[:1]))
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is not None:
            strategy.backward(loss / self.trainer.accumulate_grad_batches, opt)

    @contextlib.contextmanager
    def _second_pass(self) -> Iterator[None]:
        self._in_second_pass = True
        try:
            yield
        finally:
            self._in_second_pass = False

    @property
    def _scaler(self) -> GradScaler | None:
        scaler: GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler

    def _no_sync(self) -> contextlib.AbstractContextManager[Any]:
        block = getattr(self.trainer.strategy, "block_backward_sync", contextlib.nullcontext)
        return block()

    # ---- manual optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """As in Lightning; what it returns can take a step in two halves."""
        found = super().optimizers(use_pl_optimizer)
        for optimizer in found if isinstance(found, list) else [found]:
            ours = isinstance(optimizer, LightningOptimizer) and isinstance(optimizer.optimizer, SharpnessAware)
            if ours and not self.automatic_optimization:
                self._give_halves(optimizer)
        return found

    def _give_halves(self, wrapper: Any) -> None:
        """Sets methods on Lightning's wrapper: what is inherited by its class would keep a step's state there."""
        opt: SharpnessAware = wrapper.optimizer
        reduce_with(opt, self.trainer.strategy.model)
        for name in _OF_THE_OPTIMIZER:
            setattr(wrapper, name, getattr(opt, name))
        wrapper.first_step = functools.partial(opt.first_step, scaler=self._scaler)
        wrapper.second_step = functools.partial(_second_step, wrapper)
        wrapper.step = functools.partial(_step, wrapper, self._scaler)


def _step(wrapper: Any, scaler: GradScaler | None, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
    """``LightningOptimizer.step``: a whole step, or what is left of one."""
    opt = wrapper.optimizer
    if closure is None:
        with _ends_by_step(opt):
            return LightningOptimizer.step(wrapper)
    if scaler is None and (kwargs or opt.share_rng):
        return LightningOptimizer.step(wrapper, closure, **kwargs)
    # With a scaler, Lightning's precision plugin would evaluate the closure once, and then step without it.
    passes = MicroBatches()
    loss = passes.first(opt, lambda _: closure(), None)
    passes.second(opt, lambda _: closure(), scaler)
    with _ends_by_step(opt):
        LightningOptimizer.step(wrapper)
    return loss


def _second_step(wrapper: Any, zero_grad: bool = False) -> None:
    """``second_step`` by way of Lightning, which counts steps and updates its loss scale."""
    wrapper.step()
    if zero_grad:
        wrapper.optimizer.zero_grad()


@contextlib.contextmanager
def _ends_by_step(opt: SharpnessAware) -> Iterator[None]:
    """In the block ``opt.step(closure)`` ends the step under way, after the closure: Lightning has one call for all steps."""
    patched = vars(opt).get("step")  # by a learning-rate scheduler
    end = opt.step

    def step(closure: Callable[[], Any] | None = None) -> Any:
        result = closure() if closure is not None else None
        end()
        return result

    opt.step = step  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del opt.step
        if patched is not None:
            opt.step = patched  # type: ignore[method-assign]
