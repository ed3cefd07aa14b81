"""Building and installing: what goes wrong on other people's machines says so in one sentence, with the fix."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernels

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sys.modules["samkern"].__file__).parent


def run(*command, cwd=ROOT, **environment):
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def python(code, **options):
    return run(sys.executable, "-c", code, **options)


@pytest.fixture
def copy_of_package(tmp_path):
    """samkern as a plain folder, to be broken."""
    shutil.copytree(PACKAGE, tmp_path / "samkern", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


TRAIN = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # it would find what is missing here
import torch, samkern
p = torch.nn.Parameter(torch.ones(3))
opt = samkern.SAM([p], torch.optim.SGD, lr=0.1)
opt.step(lambda: setattr(p, "grad", torch.ones(3)))
print(p.tolist()[0] < 1, samkern.__file__, opt.explain().splitlines()[1])
"""


def test_without_a_compiler():
    result = run(sys.executable, "setup.py", "build_ext", "--inplace", CXX="/nowhere/g++")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == (
        "samkern needs a C++20 compiler and found none at CXX=/nowhere/g++: install g++ 12 or newer (or set CXX), "
        "or install without the extension by SAMKERN_BUILD=0"
    )


def test_kernels_are_measured_as_they_are_built():
    """``make kernels`` and the tests compile with the flags of ``setup.py``, but for what changes no code."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    [flags] = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "NVCC_FLAGS"]
    assert [flag for flag in ast.literal_eval(flags) if flag not in ("-lineinfo", "--threads", "4")] == [*kernels.FLAGS]


def test_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    result = run(sys.executable, "setup.py", "--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == (
        "samkern builds against the torch that you run, and there is none in this environment: "
        "install torch first, then run `pip install --no-build-isolation -e .`"
    )


def test_built_for_another_torch(copy_of_package):
    """One warning that names both versions and the fix; the package works on plain passes; asking by name raises."""
    facts = copy_of_package / "samkern" / "_build.json"
    facts.write_text(json.dumps({"torch": "1.0.0", "python": "3.11"}))
    result = python(TRAIN, cwd=copy_of_package, PYTHONPATH=str(copy_of_package))
    assert result.stdout.startswith(f"True {copy_of_package}")
    assert "backend: reference" in result.stdout
    assert result.stderr.count("Warning") == 1
    assert f"samkern._C was built for torch 1.0.0, running is {torch.__version__}; build it" in result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr
    asking = f"{TRAIN}\nsamkern.SAM([p], torch.optim.SGD, lr=0.1, backend='cpu')"
    result = python(asking, cwd=copy_of_package, PYTHONPATH=str(copy_of_package))
    assert "NotBuiltError: backend 'cpu' cannot run here: samkern._C was built for torch 1.0.0" in result.stderr


def test_without_the_extension(copy_of_package):
    for library in (copy_of_package / "samkern").glob("*.so"):
        library.unlink()
    (copy_of_package / "samkern" / "_build.json").unlink(missing_ok=True)
    result = python(TRAIN, cwd=copy_of_package, PYTHONPATH=str(copy_of_package))
    assert result.stdout.startswith("True")
    assert "samkern._C is not built for Python" in result.stderr


def test_a_library_that_does_not_load(copy_of_package):
    """An undefined symbol, a wrong architecture: the loader's own words, and both versions."""
    for library in (copy_of_package / "samkern").glob("*.so"):
        library.write_bytes(b"not a library")
    (copy_of_package / "samkern" / next(PACKAGE.glob("*.so"), Path("_C.so")).name).write_bytes(b"not a library")
    result = python(TRAIN, cwd=copy_of_package, PYTHONPATH=str(copy_of_package))
    assert result.stdout.startswith("True")
    assert "samkern._C does not load" in result.stderr


def test_installing_without_the_extension(tmp_path):
    """SAMKERN_BUILD=0: no compiler is asked for, every package arrives, and training works."""
    source, target = tmp_path / "source", tmp_path / "target"
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "build", "*.so", "_build.json", "*.egg-info", "__pycache__", "results"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        ".",
    ]
    result = run(*pip, cwd=source, SAMKERN_BUILD="0", CXX="/nowhere/g++")
    assert result.returncode == 0, result.stderr
    installed = {str(path.relative_to(target / "samkern").parent) for path in (target / "samkern").rglob("*.py")}
    assert installed == {
        ".",
        "demo",
        "integrations",
        "ops",
        "optim",
        "landscape",
        "reporting",
        "sharpness",
        "triton_kernels",
    }
    assert not list(target.rglob("*.so"))
    result = python(TRAIN, cwd=tmp_path, PYTHONPATH=str(target))
    assert result.stdout.startswith(f"True {target}"), result.stderr


def test_the_build_left_its_facts():
    if not list(PACKAGE.glob("*.so")):
        pytest.skip("samkern._C is not built")
    facts = json.loads((PACKAGE / "_build.json").read_text())
    assert set(facts) == {"torch", "python", "compiler", "flags", "cuda", "commit"}
    assert facts["torch"] == torch.__version__
    assert "fast-math" not in facts["flags"]


def test_commands():
    result = run(sys.executable, "-m", "samkern", "info")
    assert result.returncode == 0
    assert "reference  available" in result.stdout
    assert run(sys.executable, "-m", "samkern").stdout.startswith("usage: python -m samkern")
    result = run(sys.executable, "-m", "samkern", "fly")
    assert (result.returncode, result.stdout[:6]) == (2, "usage:")
    result = run(sys.executable, "-m", "samkern", "bench", "--collect-only")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_sam[" in result.stdout
