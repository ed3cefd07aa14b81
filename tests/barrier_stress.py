"""The product that ``barrier_stress.cu`` and ``triton_barrier.py`` fold through their barriers, computed without any.

From P = 1, in round r: P = M_0 M_1 ... M_{n-1}, where block b contributes M_b = [[1 + x y, x], [y, 1]] with
x = (P_01 + r) 2654435761 + b 2246822519 and y = (P_10 + b) 3266489917 + r 668265263, all modulo 2^32.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch

from bench import kernels

SOURCE = Path(__file__).with_suffix(".cu")


def expected(n_blocks: int, n_rounds: int) -> list[int]:
    """The last product, row by row. Neighbours are multiplied pair by pair, which keeps their order."""
    blocks = np.arange(n_blocks, dtype=np.uint32)
    product = np.eye(2, dtype=np.uint32)
    for r in range(n_rounds):
        turn = np.uint32(r)
        with np.errstate(over="ignore"):  # that is the modulus
            x = (product[0, 1] + turn) * np.uint32(2654435761) + blocks * np.uint32(2246822519)
            y = (product[1, 0] + blocks) * np.uint32(3266489917) + turn * np.uint32(668265263)
            one = np.ones_like(x)
            matrices = np.stack([one + x * y, x, y, one]).reshape(2, 2, n_blocks)
            while matrices.shape[2] > 1:
                n = matrices.shape[2] // 2 * 2
                left, right, rest = matrices[:, :, 0:n:2], matrices[:, :, 1:n:2], matrices[:, :, n:]
                pairs = left[:, 0, None] * right[None, 0] + left[:, 1, None] * right[None, 1]
                matrices = np.concatenate([pairs, rest], axis=2)
        product = matrices[:, :, 0]
    return [int(entry) for entry in product.flatten()]


class BarrierStress:
    """The kernel of a library that was built from ``barrier_stress.cu``, for a GPU or for fibers."""

    def __init__(self, library: Path | str) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.samkern_barrier_stress.restype = ctypes.c_char_p

    def n_blocks(self) -> int:
        """Blocks that are resident at the same time."""
        return int(self._library.samkern_barrier_stress_blocks())

    def __call__(self, n_blocks: int, n_rounds: int, device: str = "cpu") -> list[list[int]]:
        """What every block arrived at.

        Raises:
            RuntimeError: it could not be launched, or did not end.
        """
        matrices = torch.full((2, n_blocks, 4), torch.nan, dtype=torch.float64, device=device)
        products = torch.full((n_blocks, 4), -1.0, dtype=torch.float64, device=device)
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in (matrices, products)]
        error = self._library.samkern_barrier_stress(*addresses, n_blocks, n_rounds, ctypes.c_void_p(stream))
        if error is not None:
            raise RuntimeError(error.decode())
        return [[int(entry) for entry in row] for row in products.tolist()]


def build(folder: Path, architecture: str) -> Path:
    """Compiles the kernel with nvcc into a library."""
    target = folder / "barrier_stress.so"
    command = [kernels.nvcc() or "nvcc", "-shared", "-Xcompiler", "-fPIC", *kernels.FLAGS, f"-arch=sm_{architecture}"]
    command += [str(SOURCE), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return target
