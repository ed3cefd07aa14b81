"""Which implementation of the passes runs where, and why.

``reference`` is plain PyTorch and runs anywhere; ``cpu`` and ``cuda`` are the compiled extensions; ``triton`` serves GPUs.
``auto`` takes the fastest that can serve the device. The choice can be overridden for a block of code, for the process, or
for one optimizer::

    with samkern.use_backend("reference"):
        opt.step(closure)

    SAMKERN_BACKEND=reference python train.py

    opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, backend="reference")
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REBUILD = "build it for this environment: pip install --no-build-isolation -e . (in samkern's source folder)"


class NotBuiltError(ImportError):
    """A backend was asked for by name and cannot run here. The text says why and what to do."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the passes: whether it can run here, and why (not)."""

    name: str
    available: bool
    why: str


def _build_facts() -> dict[str, str] | None:
    """What the extension was built for, as ``setup.py`` left it beside the library."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else None


def _load_extension() -> tuple[ModuleType | None, str]:
    facts = _build_facts()
    if facts is not None and facts["torch"] != torch.__version__:
        return None, f"samkern._C was built for torch {facts['torch']}, running is {torch.__version__}; {REBUILD}"
    try:
        return importlib.import_module("samkern._C"), "samkern._C is built"
    except ModuleNotFoundError as error:
        if error.name != "samkern._C":
            raise
        return None, f"samkern._C is not built for Python {platform.python_version()}; {REBUILD}"
    except ImportError as error:  # an undefined symbol, say
        built = f"built for {facts}" if facts else "built for an unknown torch"
        return None, f"samkern._C does not load ({error}); {built}, running torch {torch.__version__}; {REBUILD}"


native, _why_native = _load_extension()


def _load_cuda() -> tuple[bool, str]:
    """Loads samkern._cuda, which hands its kernels to samkern._C."""
    if native is None:
        return False, "samkern._cuda needs samkern._C, which is not there"
    try:
        native.use_device_functions(importlib.import_module("samkern._cuda").functions)
    except ModuleNotFoundError as error:
        if error.name != "samkern._cuda":
            raise
        return False, f"samkern._cuda is not built (that takes a CUDA build of torch, and nvcc); {REBUILD}"
    except ImportError as error:
        return False, f"samkern._cuda does not load ({error}); {REBUILD}"
    if torch.cuda.device_count() == 0:  # unlike is_available(), leaves the driver alone: the process may still fork
        return False, "samkern._cuda is built, but torch finds no GPU"
    return True, "samkern._cuda is built"


def in_interpreter() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors: for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _version_of(*distributions: str) -> str:
    """The first that is installed: nightly builds of torch bring their Triton under another name."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "of unknown version"


def _find_triton() -> tuple[bool, str]:
    """Looks without importing: Triton reads TRITON_INTERPRET when it is imported, and takes its time."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (CUDA builds of torch bring it; else: pip install triton)"
    if importlib.util.find_spec("samkern.triton_kernels") is None:
        return False, f"samkern.triton_kernels is not in this checkout; {REBUILD}"
    version = f"Triton {_version_of('triton', 'pytorch-triton')}"
    if in_interpreter():
        return True, f"{version} interpreted (TRITON_INTERPRET=1): CPU tensors only, slowly, for tests"
    if torch.cuda.device_count() == 0:
        return False, f"{version} found no GPU (to test its kernels on the CPU: TRITON_INTERPRET=1)"
    return True, f"{version}, tensors on a GPU"


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", True, "plain PyTorch, any device"),
        Backend("cpu", native is not None, _why_native),
        Backend("cuda", *_load_cuda()),
        Backend("triton", *_find_triton()),
    )
}
_emulated = False


@contextlib.contextmanager
def emulated_cuda(kernels: ModuleType) -> Iterator[None]:
    """Within the block, backend ``cuda`` runs ``kernels``, the GPU kernels compiled for the CPU, on CPU tensors: for tests.

    ``auto`` never takes it.
    """
    global _emulated
    if native is None:
        raise NotBuiltError(_why_native)
    native.use_device_functions(kernels.functions)
    before = _BACKENDS["cuda"], _emulated
    _BACKENDS["cuda"], _emulated = Backend("cuda", True, "emulated: CPU tensors only, slowly, for tests"), True
    try:
        yield
    finally:
        _BACKENDS["cuda"], _emulated = before
        native.use_device_functions(None)
        _load_cuda()


def backends() -> dict[str, Backend]:
    """All backends by name, each with whether it can run here and why.

    >>> samkern.backends()["reference"].available
    True
    """
    return dict(_BACKENDS)


_override: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, all passes run on backend ``name``, or on the best one for their device if it is ``"auto"``.

    It wins over ``SAMKERN_BACKEND`` and over the ``backend=`` of an optimizer. Not per thread: the choice is the process's.

    Raises:
        ValueError: no backend of that name.
        NotBuiltError: it cannot run here.
    """
    global _override
    check(name)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def check(name: str) -> str:
    """``name`` if it is ``"auto"`` or a backend that can run here."""
    if name == "auto":
        return name
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(['auto', *_BACKENDS])}, got {name!r}")
    if not _BACKENDS[name].available:
        raise NotBuiltError(f"backend {name!r} cannot run here: {_BACKENDS[name].why}")
    return name


def resolve(device: torch.device, requested: str | None = None) -> str:
    """The backend for tensors on ``device``: the override, else ``requested``, else ``SAMKERN_BACKEND``, else the fastest.

    Raises:
        ValueError: unknown name, or a named backend that does not serve this device.
        NotBuiltError: a named backend that cannot run here.
    """
    name = check(_override or requested or os.environ.get("SAMKERN_BACKEND") or "auto")
    if name == "auto":
        return next(candidate for candidate in ("cuda", "triton", "cpu", "reference") if _is_fast(candidate, device))
    serves = _serves(name)
    if serves and device.type != serves:
        raise ValueError(
            f"backend {name!r} serves {serves.upper()} tensors, got tensors on {device}; use backend='auto'"
        )
    return name


def _serves(name: str) -> str:
    """The type of device that a backend serves; empty: all."""
    return {"cpu": "cpu", "cuda": "cpu" if _emulated else "cuda", "triton": "cpu" if in_interpreter() else "cuda"}.get(
        name, ""
    )


def _is_fast(name: str, device: torch.device) -> bool:
    """Whether ``auto`` takes it for ``device``. Kernels for GPUs on the CPU are slower than anything."""
    for_tests = name in ("cuda", "triton") and _serves(name) == "cpu"
    return _BACKENDS[name].available and _serves(name) in ("", device.type) and not for_tests


def info() -> str:
    """Version, backends and build facts, as ``python -m samkern info`` prints them."""
    from . import __version__

    lines = [
        f"samkern {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    ]
    for backend in backends().values():
        lines.append(f"  {backend.name:<10} {'available' if backend.available else 'not available'}: {backend.why}")
    facts: dict[str, Any] = _build_facts() or {"build": "none: plain PyTorch passes only"}
    lines.append("build")
    lines.extend(f"  {key:<10} {value}" for key, value in facts.items())
    lines.append(f"threads    {torch.get_num_threads()} (torch.set_num_threads counts here too)")
    return "\n".join(lines)
