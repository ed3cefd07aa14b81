"""Builds samkern._C against the torch that is installed: `pip install --no-build-isolation -e .`

Where torch was built for CUDA and nvcc is there, samkern._cuda is built too.

Environment: SAMKERN_BUILD=0 installs without extensions (plain PyTorch passes, any device); SAMKERN_CUDA=0 without the
GPU's, SAMKERN_CUDA=1 insists on it; TORCH_CUDA_ARCH_LIST names the architectures; CXX names the compiler.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SOURCES = [
    "bindings.cpp",
    "ops.cpp",
    "tables.cpp",
    "device_tables.cpp",
    *(
        f"cpu/{name}.cpp"
        for name in ("convert", "sums", "bits", "reduce", "perturb", "noise", "update", "select", "fisher")
    ),
]
# No fast math anywhere, and no contraction: the passes are bitwise the same on every instruction set and backend.
# -fopenmp is for at::parallel_for in torch's headers; it is not linked, so that torch's own copy of the runtime serves.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
]
if sys.platform == "linux":
    FLAGS.append("-fopenmp")


NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-lineinfo", "--threads", "4"]
ARCHITECTURES = ("8.0", "9.0", "10.0")


def require_torch():
    try:
        import torch
    except ImportError:
        sys.exit(
            "samkern builds against the torch that you run, and there is none in this environment: "
            "install torch first, then run `pip install --no-build-isolation -e .`"
        )
    return torch


def require_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
    if not shutil.which(compiler):
        sys.exit(
            f"samkern needs a C++20 compiler and found none{f' at CXX={compiler}' if compiler else ''}: install g++ 12 or "
            "newer (or set CXX), or install without the extension by SAMKERN_BUILD=0"
        )
    return compiler


def first_line(*command: str) -> str:
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip().splitlines()[0]
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def link_triton_kernels() -> None:
    """Puts triton_kernels/ where an installation has it, so that a checkout on PYTHONPATH finds samkern.triton_kernels."""
    link = ROOT / "samkern" / "triton_kernels"
    if not link.exists():
        link.symlink_to("../triton_kernels", target_is_directory=True)


def builds_cuda(torch) -> bool:
    """Whether to build samkern._cuda. Does not ask for a GPU: machines that build often have none."""
    from torch.utils.cpp_extension import CUDA_HOME

    setting = os.environ.get("SAMKERN_CUDA", "auto")
    missing = []
    if torch.version.cuda is None:
        missing.append("a torch built for CUDA (this one is for the CPU)")
    if CUDA_HOME is None:
        missing.append("the CUDA toolkit with nvcc (set CUDA_HOME)")
    if setting == "1" and missing:
        sys.exit(f"SAMKERN_CUDA=1 needs {' and '.join(missing)}")
    return setting != "0" and not missing


def cuda_extension():
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        nvcc = str(Path(CUDA_HOME) / "bin" / "nvcc")
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        names = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known.split()]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"
    sources = ["csrc/cuda_ops.cpp", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))]
    headers = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")))
    flags = {"cxx": FLAGS, "nvcc": NVCC_FLAGS}
    return CUDAExtension("samkern._cuda", sources, extra_compile_args=flags, depends=headers)


def extension_arguments() -> dict:
    torch = require_torch()
    compiler = require_compiler()
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    with_cuda = builds_cuda(torch)

    class Build(BuildExtension):
        """Leaves the facts of the build beside the library, for `python -m samkern info` and for load errors."""

        def run(self):
            if self.inplace:
                link_triton_kernels()  # first: they need no compiler
            super().run()
            folder = ROOT if self.inplace else Path(self.build_lib)
            facts = {
                "torch": torch.__version__,
                "python": f"{sys.version_info.major}.{sys.version_info.minor}",
                "compiler": first_line(compiler, "--version"),
                "flags": " ".join(FLAGS),
                "cuda": f"{torch.version.cuda}, {os.environ['TORCH_CUDA_ARCH_LIST']}" if with_cuda else "not built",
                "commit": first_line("git", "rev-parse", "--short", "HEAD"),
            }
            (folder / "samkern" / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    sources = [f"csrc/{source}" for source in SOURCES]
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
    extension = CppExtension("samkern._C", sources, extra_compile_args=FLAGS, depends=headers)
    extensions = [extension, cuda_extension()] if with_cuda else [extension]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


setup(**(extension_arguments() if os.environ.get("SAMKERN_BUILD", "1") != "0" else {}))
