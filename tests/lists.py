"""Tensor lists for tests of passes: shapes around chunk borders, layouts, canaries, and comparisons."""

from __future__ import annotations

import torch
from torch import Tensor

from samkern.options import Climb

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (FP32, FP64, BF16, FP16)
CHUNK = 65_536
CLIMBS = [climb for climb in Climb if climb.along_gradient]


def affordable(backend: str, usual: int, on_cpu: int) -> int:
    """How much of something a test takes: less where kernels for GPUs run, slowly, on the CPU."""
    on_gpu = torch.get_default_device().type != "cpu"
    return usual if on_gpu or backend not in ("cuda", "triton") else on_cpu


def chunk(backend: str) -> int:
    """Elements that a backend's kernels take at once; of Triton's interpreted ones, a tile of a chunk."""
    return 1 << 14 if backend == "cuda" else affordable(backend, CHUNK, 1 << 12)


def sums_error(backend: str, dtype: torch.dtype) -> float:
    """How far sums of a backend may be from the reference's, relatively: cuda adds up to 32 products in float32."""
    return 3e-7 if backend == "cuda" and dtype != FP64 else 1e-12


def dtype_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def seeded(seed: int) -> torch.Generator:
    """A generator for tensors where tests make them now."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def shapes_for(backend: str) -> dict[str, list[tuple[int, ...]]]:
    n = chunk(backend)
    return {
        "one": [(3,)],
        "chunk_borders": [(0,), (1,), (), (n - 1,), (n,), (n + 1,), (2, 0, 3)],
        "conv_net": [(8, 3, 3, 3), (8,), (16, 8, 3, 3), (16,), (10, 64), (10,)],
        "tiny": [(64,)] * 60,
        "long_filters": [(2, n + 4464), (1, 1000), (affordable(backend, 70_000, 700), 2)],
    }


def random_list(shapes: list[tuple[int, ...]], dtype: torch.dtype = FP32, scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(shape)).to(dtype) for shape in shapes]


def mixed_list(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Every dtype, in turn."""
    return [torch.randn(shape).to(DTYPES[i % len(DTYPES)]) for i, shape in enumerate(shapes)]


def poisoned_like(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs full of NaN: an entry that is not written shows."""
    return [torch.full_like(x, torch.nan, dtype=dtype or x.dtype) for x in tensors]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone(memory_format=torch.preserve_format) for x in tensors]


def guarded_list(tensors: list[Tensor], offset: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Copies amid a border of canaries, ``offset`` entries off alignment; and the whole buffers, to look at the borders."""
    views, buffers = [], []
    for x in tensors:
        buffer = torch.full((x.numel() + 64,), 7.0, dtype=x.dtype)
        start = 32 + offset
        view = buffer[start : start + x.numel()].view(x.shape)
        view.copy_(x)
        views.append(view)
        buffers.append(buffer)
    return views, buffers


def borders_intact(views: list[Tensor], buffers: list[Tensor]) -> bool:
    for view, buffer in zip(views, buffers, strict=True):
        rest = buffer.clone()
        start = view.storage_offset()
        rest[start : start + view.numel()] = 7.0
        if not bool((rest == 7.0).all()):
            return False
    return True


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal values, NaN equal to NaN, and -0 unequal to 0."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return len(a) == len(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(integer[x.element_size()]), y.contiguous().view(integer[y.element_size()]))
        for x, y in zip(a, b, strict=True)
    )


def same_tree(a: object, b: object) -> bool:
    """Equal values all through dicts and lists; tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits([a], [b]) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b


def agree(a: list[Tensor], b: list[Tensor], backend: str) -> bool:
    """Whether weights trained on a backend are the reference's: bitwise, float64 but for the order of additions.

    cuda's sums differ by more, so weights may by a last place, and in float64 beside lists of other types.
    """
    last_places = {FP64: 1e-6, FP32: 1e-6, BF16: 2e-2, FP16: 2e-3}

    def equal(x: Tensor, y: Tensor) -> bool:
        if backend == "cuda":
            return torch.allclose(x, y, rtol=last_places[x.dtype], atol=1e-6)
        return torch.allclose(x, y, rtol=1e-13) if x.dtype == FP64 else same_bits([x], [y])

    return len(a) == len(b) and all(map(equal, a, b))


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=FP64)
