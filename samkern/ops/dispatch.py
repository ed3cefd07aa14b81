"""From a call to an implementation: checks of the lists, and the backend for their device."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference, reference_masks, reference_noise
from ..backends import native, resolve
from ..bitmask import BitMask
from ..tensors import DTYPES, is_dense, overlaps_itself, same_layout

Tensors = Sequence[Tensor]


def implementation(
    name: str, backend: str | None, *, reads: dict[str, Tensors], writes: Mapping[str, Tensors]
) -> Callable[..., Any]:
    """Checks the lists and returns the function that runs the pass on the backend for their device."""
    lists = {**writes, **reads}
    first = next(iter(lists.values()))
    if torch.compiler.is_compiling() or native is None or not native.lists_fit(list(lists.values()), len(writes)):
        _check_lists(lists, writes)
    resolved = resolve(first[0].device, backend) if first else "reference"
    if resolved == "triton" and not torch.compiler.is_compiling():
        from ..triton_kernels import ops as kernels  # imports Triton

        launched: Callable[..., Any] = getattr(kernels, name)
        return launched
    if resolved not in ("cpu", "cuda") or native is None:
        modules = (reference, reference_masks, reference_noise)
        function: Callable[..., Any] = next(getattr(module, name) for module in modules if hasattr(module, name))
        return function
    if name in _TRACED and torch.compiler.is_compiling():
        return functools.partial(_with_numbers_as_tensors, *_TRACED[name])
    return _decompose if name == "decompose" else getattr(torch.ops.samkern, _OPS[name])


def _check_lists(lists: Mapping[str, Tensors], writes: Mapping[str, Tensors]) -> None:
    first_name, first = next(iter(lists.items()))
    for list_name, tensors in lists.items():
        if len(tensors) != len(first):
            raise ValueError(
                f"{list_name} has {len(tensors)} tensors, {first_name} has {len(first)}; lists must be equally long"
            )
        for i, (x, like) in enumerate(zip(tensors, first, strict=True)):
            _check_tensor(f"{list_name}[{i}]", x, like, written=list_name in writes)


def _check_tensor(what: str, x: Tensor, like: Tensor, *, written: bool) -> None:
    if x.layout != torch.strided or x.dtype not in DTYPES:
        raise TypeError(
            f"{what} must be a dense float32, float64, bfloat16 or float16 tensor, got {x.layout} {x.dtype}"
        )
    if x.shape != like.shape or x.device != like.device:
        raise ValueError(f"{what} is {tuple(x.shape)} on {x.device}, expected {tuple(like.shape)} on {like.device}")
    if written and (overlaps_itself(x) or not is_dense(x) or not same_layout(x, like)):
        raise ValueError(
            f"{what} is written: it must be dense with strides {like.stride()}, got {x.stride()}; pass a copy"
        )


def row_major(tensors: Tensors) -> list[Tensor]:
    """Copies of those that are not; what is not even dense is left to the checks."""
    return [x.contiguous() if x.layout == torch.strided else x for x in tensors]


def check_mask(mask: BitMask, like: Tensors) -> None:
    """Raises ``ValueError`` unless ``mask`` is over tensors of these shapes, on their device."""
    shapes = tuple(x.shape for x in like)
    if mask.shapes != shapes:
        i = next((i for i, (a, b) in enumerate(zip(mask.shapes, shapes, strict=False)) if a != b), None)
        what = f"{len(mask.shapes)} tensors" if i is None else f"shape {tuple(mask.shapes[i])} at {i}"
        expected = f"{len(shapes)}" if i is None else f"{tuple(shapes[i])}"
        raise ValueError(f"mask is over other tensors: it has {what}, expected {expected}")
    if like and mask.bits.device != like[0].device:
        raise ValueError(f"mask is on {mask.bits.device}, expected {like[0].device}; move it by mask.to(device)")


def bits_like(mask: BitMask | None, like: Tensors) -> Tensor | None:
    """The bits of a mask in the order of the memory of ``like``, as kernels read them."""
    if mask is None:
        return None
    check_mask(mask, like)
    return torch.cat(mask.in_layout_of(like)) if like and not all(x.is_contiguous() for x in like) else mask.bits


def check_counts(**counts: int) -> None:
    """Raises ``ValueError`` unless they are integers >= 0 that a kernel can take."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << (32 if name == "t" else 63):
            raise ValueError(f"{name} must be an integer >= 0{' and < 2^32' if name == 't' else ''}, got {value!r}")


def signed(seed: int) -> int:
    """The same 64 bits as the int64 that a schema takes."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def check_same_dtypes(saved: Tensors, w: Tensors) -> None:
    """Raises ``TypeError`` unless saved weights have the dtypes of the weights."""
    for i, (x, like) in enumerate(zip(saved, w, strict=True)):
        if x.dtype != like.dtype:
            raise TypeError(f"saved[{i}] must be {like.dtype} like w[{i}], got {x.dtype}")


_OPS = {
    "norms": "norms",
    "difference_dot": "difference_dot",
    "perturb": "perturb_",
    "gaussian_perturb": "gaussian_perturb_",
    "restore": "restore_",
    "combine": "combine_",
    "topk_mask": "topk_mask_",
    "drop_grow_mask": "drop_grow_mask_",
    "fisher_accumulate": "fisher_accumulate_",
    "update_sgd": "update_sgd_",
    "update_adam": "update_adam_",
    "update_adamw": "update_adamw_",
}


def _decompose(c: list[Tensor], g: list[Tensor], g_s: list[Tensor], k: Tensor) -> Tensor:
    cc = torch.empty(len(c) + 1, dtype=torch.float64, device=k.device)
    torch.ops.samkern.decompose_(c, g, g_s, k, cc)
    return cc


def _with_numbers_as_tensors(op: Callable[..., Any], numbers: list[str], *args: Any, **options: Any) -> Any:
    # torch.tensor(x) would have the value at hand in the graph; in a sum the compiler keeps the variable.
    values = []
    for name in numbers:
        dtype = torch.int64 if isinstance(options[name], int) else torch.float64
        values.append(torch.zeros((), dtype=dtype, device="cpu") + options.pop(name))
    return op(values, *args, **options)


_TRACED: dict[str, tuple[Callable[..., Any], list[str]]] = {}

if native is not None:
    # Shapes only, for torch.compile: every op writes what its schema says, and returns nothing but for the reductions.
    @torch.library.register_fake("samkern::norms")  # type: ignore[untyped-decorator]
    def _norms_fake(a: list[Tensor], *args: Any, **options: Any) -> Tensor:
        return a[0].new_empty(len(reference.SUMS), len(a) + 1, dtype=torch.float64)

    @torch.library.register_fake("samkern::difference_dot")  # type: ignore[untyped-decorator]
    def _difference_dot_fake(a: list[Tensor], *args: Any) -> Tensor:
        return a[0].new_empty(len(a) + 1, dtype=torch.float64)

    def _nothing(*args: Any, **options: Any) -> None:
        return None

    _FAKES = {"norms": _norms_fake, "difference_dot": _difference_dot_fake}
    for _name in (*_OPS.values(), "decompose_"):
        if _name not in _FAKES:
            torch.library.register_fake(f"samkern::{_name}")(_nothing)

    # A compiler makes a graph for every value of a number that an op takes, and so for every learning rate. What it traces
    # takes them as float64 tensors on the CPU, which cost nothing to read.
    def _define_traced(op: Any) -> tuple[Callable[..., Any], list[str]]:
        """The twin of an op whose numbers come first, in a list of tensors; and their names."""
        [(name, arguments, returns)] = re.findall(r"samkern::(\w+)\((.*)\) -> (.*)", str(op._schema))
        numbers = re.findall(r"(?:float|int) (\w+)", arguments)
        others = [argument for argument in arguments.split(", ") if not argument.startswith(("float ", "int "))]
        twin, arguments = f"samkern::traced_{name}", ", ".join(["Tensor[] numbers", *others]).removesuffix(", *")
        torch.library.define(twin, f"({arguments}) -> {returns}")
        names = [argument.name for argument in op._schema.arguments if argument.name not in numbers]

        def run(values: list[Tensor], *args: Any, **options: Any) -> Any:
            given = {number: x.item() for number, x in zip(numbers, values, strict=True)}
            return op(**dict(zip(names, args, strict=False)), **options, **given)

        fake = _FAKES.get(name, _nothing)
        torch.library.impl(twin, "CompositeExplicitAutograd", run)
        torch.library.register_fake(twin)(lambda values, *args, **options: fake(*args, **options))
        return getattr(torch.ops.samkern, f"traced_{name}"), numbers

    _found = {name: getattr(torch.ops.samkern, op).default for name, op in _OPS.items()}
    _TRACED = {name: _define_traced(op) for name, op in _found.items() if re.search(r"\b(float|int) ", str(op._schema))}
