"""Which choices go together, and with which way of calling a step: errors that say what does not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..options import ClimbGroup
from ..shards import is_sharded
from .base import fused_rule
from .checks import warn_caller
from .keeper import parameters_of
from .mask import DynamicMask
from .ranks import can_skip_reduction, n_ranks

if TYPE_CHECKING:
    from .loop import StepLoop


def check_choices(opt: StepLoop) -> None:
    """Raises ``ValueError`` for choices that exclude each other or do not fit the parameters."""
    if opt.reuse is not None:
        opt.reuse.check_parameters(parameters_of(opt.base), opt.model)
    if opt.perturbation.before_pass:
        _check_before_pass(opt)
    if opt.learned is not None and opt.share_rng:
        raise ValueError("radius=LearnedRadius does not go with share_rng=True: its passes have batches of their own")
    if opt.capturable:
        _check_capturable(opt)
    if opt.perturb_sync == "local":
        _check_local(opt)
    if any(map(is_sharded, parameters_of(opt.base))):
        _check_sharded(opt)
    if n_ranks(opt.model) > 1 and any(map(_is_flattened, parameters_of(opt.base))):
        raise ValueError(
            "parameters of FullyShardedDataParallel are plain tensors, of which no process knows what the others have, and "
            "norms would be those of parts: use torch.distributed.fsdp.fully_shard, or DistributedDataParallel"
        )


def _is_flattened(p: Tensor) -> bool:
    """Whether it is, or lies in, a flat parameter of ``FullyShardedDataParallel``, which marks both."""
    return getattr(p, "_fsdp_flattened", False)


def check_kinds(**choices: tuple[Any, type]) -> None:
    """Raises ``TypeError`` unless each choice is None or an instance of its kind."""
    for name, (choice, kind) in choices.items():
        if choice is not None and not isinstance(choice, kind):
            raise TypeError(f"{name} must be a samkern.optim.{kind.__name__}, got {choice!r}")


def _check_before_pass(opt: StepLoop) -> None:
    name = type(opt.perturbation).__name__
    if opt.mask is not None and not opt.perturbation.of_parameters:
        raise ValueError(f"mask= chooses entries of parameters, and {name} moves none of them: leave it out")
    if opt.reuse is not None:
        raise ValueError(f"reuse needs two gradients of a step, and with {name} there is one")
    if opt.learned is not None:
        raise ValueError(f"radius=LearnedRadius needs two gradients of a step, and with {name} there is one")
    if opt.schedule.reads_gradients:
        raise ValueError(f"{type(opt.schedule).__name__} decides by a gradient, and {name} climbs before there is one")
    if opt.schedule.wants_change:
        raise ValueError(
            f"{type(opt.schedule).__name__} compares the two gradients of a look, and with {name} there is one"
        )
    if judges_gradients(opt):
        raise ValueError(f"{type(opt.mask).__name__} chooses by a gradient, and {name} climbs before there is one")
    if opt.perturbation.along_momentum:
        check_momentum(opt, [opt.perturbation.climb(opt.options(group)) for group in opt.param_groups])
    if opt.capturable and not opt.perturbation.along_momentum:
        raise ValueError(f"capturable=True does not go with {name}: every replay would draw the same noise")


def check_momentum(opt: StepLoop, climbs: Sequence[ClimbGroup]) -> None:
    """Raises ``ValueError`` if a group is perturbed along a momentum that it does not have, or that is not fused (now)."""
    rule, why = fused_rule(opt.base)
    if rule is None:
        name = type(opt.perturbation).__name__
        raise ValueError(f"{name} climbs along the momentum of a fused SGD, Adam or AdamW: {why}")
    for i, (group, climb) in enumerate(zip(opt.param_groups, climbs, strict=True)):
        if climb.perturbs and group.get("momentum", 1) == 0:
            raise ValueError(
                f"group {i} has momentum = 0, and there is nothing to climb along: set it, or rho = 0 for this group"
            )


def _check_sharded(opt: StepLoop) -> None:
    if opt.perturb_sync == "local":
        raise ValueError(
            "perturb_sync='local' does not go with sharded parameters, whose gradients no process has whole"
        )
    if opt.capturable:
        raise ValueError("capturable=True does not go with sharded parameters, whose gradients move")
    if opt.perturbation.noise(0, 0) is not None:
        raise ValueError(
            f"{type(opt.perturbation).__name__} does not go with sharded parameters: its noise goes by the place of an entry "
            "in the whole tensors; use DistributedDataParallel"
        )
    if isinstance(opt.mask, DynamicMask):
        raise ValueError("DynamicMask does not go with sharded parameters; use FisherMask")


def _check_capturable(opt: StepLoop) -> None:
    rule, why = fused_rule(opt.base)
    if rule is None:
        raise ValueError(f"capturable=True needs a fused update: {why}, and whether to step is then asked on the host")
    if opt.mask is not None and opt.mask.accumulates(0) is not None:
        raise ValueError("capturable=True does not go with fisher='batch': a graph cannot add to it on some steps only")
    if opt.schedule.reads_gradients:
        name = type(opt.schedule).__name__
        raise ValueError(f"capturable=True does not go with {name}, which asks the device whether to look")
    if opt.reuse is not None and any(opt.reuse.follows_steps(opt.options(group)) for group in opt.param_groups):
        name = type(opt.reuse).__name__
        raise ValueError(f"capturable=True does not go with {name}, whose weights change from step to step")
    if opt.learned is not None:
        raise ValueError(
            "capturable=True does not go with a LearnedRadius: a graph cannot add passes on some steps only"
        )
    if opt.share_rng:
        raise ValueError("capturable=True does not go with share_rng=True: a graph cannot wind back random numbers")


def _check_local(opt: StepLoop) -> None:
    reasons = {
        "a perturbation before the only pass": opt.perturbation.before_pass,
        f"{type(opt.reuse).__name__}, which mixes both gradients": opt.reuse is not None,
        f"{type(opt.schedule).__name__}, which judges gradients": opt.schedule.reads_gradients
        or opt.schedule.wants_change,
        f"{type(opt.mask).__name__}, which is chosen by gradients": judges_gradients(opt),
        "a LearnedRadius": opt.learned is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"perturb_sync='local' does not go with {reason}: processes would drift apart; use perturb_sync='global'"
            )


def check_sync(opt: StepLoop) -> None:
    """Raises ``ValueError`` if gradients cannot stay with their process, and should."""
    if opt.perturb_sync == "global" or n_ranks(opt.model) == 1:
        return
    if not can_skip_reduction(opt.model):
        raise ValueError(
            "perturb_sync='local' needs model=, the DistributedDataParallel whose reduction it leaves out, got "
            f"model={type(opt.model).__name__}"
        )
    if getattr(opt.model, "static_graph", False):
        raise ValueError(
            "perturb_sync='local' does not go with static_graph=True: that reducer reduces in every backward; leave it out, or "
            "use perturb_sync='global'"
        )


def judges_gradients(opt: StepLoop) -> bool:
    """Whether the mask is chosen by gradients of steps."""
    return opt.mask is not None and (opt.mask.wants_gradients or opt.mask.accumulates(0) is not None)


def check_closures(opt: StepLoop, closure: Any, val_closure: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``opt.step`` can be called so."""
    if closure is None and not opt.perturbation.before_pass:
        raise TypeError("step() needs a closure (zero_grad, loss, backward); or use first_step() and second_step()")
    if val_closure is not None and opt.learned is None:
        raise ValueError("val_closure is for a learned radius, which this optimizer has not: leave it out")
    if val_closure is not None and not callable(val_closure):
        raise TypeError(f"val_closure must be a function, got {val_closure!r}")
    if opt.learned is not None and val_closure is None:
        raise ValueError("a LearnedRadius needs val_closure: opt.step(closure, val_closure=...) on a validation batch")
    if closure is None or callable(closure):
        return
    if not isinstance(closure, Sequence) or not closure or not all(map(callable, closure)):
        raise TypeError(f"closure must be a function or a list of functions, got {closure!r}")
    if len(closure) > 1:
        _check_parts(opt)


def _check_parts(opt: StepLoop) -> None:
    reasons = {
        "a perturbation along the momentum": not opt.perturbation.takes_parts,
        "a reuse, which keeps gradients": opt.reuse is not None and opt.reuse.keeps,
        "a schedule that judges gradients": opt.schedule.reads_gradients or opt.schedule.wants_change,
        "a mask that is chosen by gradients": judges_gradients(opt),
        "a LearnedRadius": opt.learned is not None,
        "capturable=True": opt.capturable,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"several closures, each with its own gradient, do not go with {reason}; pass one closure")


def check_is_itself(opt: StepLoop, what: str) -> None:
    """Raises ``TypeError`` of a wrapper that inherits our methods, and would keep what they set."""
    if not opt.is_itself:
        raise TypeError(
            f"{what} of {type(opt).__name__}, which wraps an optimizer of samkern but keeps no state for it: call it on what "
            "is wrapped (its .optimizer), or derive the module from samkern.integrations.lightning.SharpnessAwareModule"
        )


def check_halves(opt: StepLoop) -> None:
    """Raises ``RuntimeError`` if a step cannot be taken in two halves, after a first pass; ``TypeError`` of a wrapper."""
    check_is_itself(opt, "first_step()")
    if opt.share_rng:
        raise RuntimeError("share_rng=True needs step(closure): first_step() comes after the first pass has drawn")
    if opt.perturbation.before_pass:
        name = type(opt.perturbation).__name__
        raise RuntimeError(f"{name} climbs before the only pass: use step(closure), or perturbed() and step()")
    if opt.learned is not None:
        raise RuntimeError("a LearnedRadius takes passes of its own: use step(closure, val_closure=...)")


def check_perturbed(opt: StepLoop) -> None:
    """Raises ``RuntimeError`` if the perturbation comes after a first pass; ``TypeError`` of a wrapper."""
    check_is_itself(opt, "perturbed()")
    if not opt.perturbation.before_pass:
        name = type(opt.perturbation).__name__
        raise RuntimeError(f"{name} climbs along a gradient, after a first pass: use first_step() and second_step()")


def check_loss(loss: Any) -> None:
    """Raises ``TypeError`` if a closure has not returned its loss, which a learned radius compares."""
    if not isinstance(loss, Real) and not (isinstance(loss, Tensor) and loss.numel() == 1):
        raise TypeError(f"a LearnedRadius compares losses: the closures must return theirs, one number, got {loss!r}")


def warn_of_half_precision(opt: StepLoop) -> None:
    """Warns if perturbations may vanish below the last place of the weights."""
    if opt.perturbation.survives_half_precision:
        return
    perturbed = [group for group in opt.param_groups if opt.perturbation.climb(opt.options(group)).perturbs]
    if any(p.element_size() == 2 for group in perturbed for p in group["params"]):
        warn_caller(
            "half-precision weights lose perturbations below half a unit in their last place; keep the weights in "
            "float32 and use autocast, or watch opt.last_step.realised"
        )
