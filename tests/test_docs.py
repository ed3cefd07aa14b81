"""What is written is true: examples run, the map matches the tree, every public name is documented, links lead somewhere."""

from __future__ import annotations

import doctest
import functools
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest
import torch

import samkern

from .recipes import README, ROOT, python_blocks

# What is written of them is run in their own test files: they need packages that take seconds to import.
INTEGRATIONS = ("lightning", "transformers", "accelerate")
DRAWING = ("numpy", "matplotlib", "plotly", "jinja2")  # what landscapes and reports take; the rest does without
MODULES = [
    module.name
    for module in pkgutil.walk_packages(samkern.__path__, "samkern.")
    if not module.name.endswith(("._C", ".__main__"))
    and ".demo" not in module.name
    and module.name.removeprefix("samkern.integrations.") not in INTEGRATIONS
]


def all_for_drawing():
    for package in DRAWING:
        pytest.importorskip(package)


@pytest.mark.parametrize("name", ["samkern", *MODULES])
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    if name.startswith(("samkern.landscape", "samkern.reporting")):
        all_for_drawing()
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), extraglobs={"samkern": samkern, "torch": torch})
    assert result.failed == 0


def public_objects():
    for owner in (samkern, samkern.history, samkern.landscape, samkern.optim, samkern.reporting, samkern.sharpness):
        for name in owner.__all__:
            yield f"{owner.__name__}.{name}", getattr(owner, name)
    for name, value in inspect.getmembers(samkern.ops, inspect.isfunction):
        if not name.startswith("_") and value.__module__.startswith("samkern.ops"):
            yield f"samkern.ops.{name}", value


PUBLIC = dict(public_objects())
WITHOUT_EXAMPLE = {  # they are returned or subclassed, not called
    "samkern.NotBuiltError",
    "samkern.optim.Companion",
    "samkern.optim.Decision",
    "samkern.optim.Mask",
    "samkern.optim.Looking",
    "samkern.optim.Now",
    "samkern.optim.Outcome",
    "samkern.optim.Perturbation",
    "samkern.optim.Reuse",
    "samkern.optim.RunningAverage",
    "samkern.optim.Schedule",
    "samkern.optim.StepRecord",
    "samkern.reporting.NoRunsError",
    "samkern.reporting.UnreadableRunError",
}


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if not inspect.ismodule(value)])
def test_every_public_name_is_documented_with_an_example(name):
    value = PUBLIC[name]
    assert value.__doc__
    if name not in WITHOUT_EXAMPLE and name not in ("samkern.info", "samkern.use_backend"):
        assert ">>>" in value.__doc__ or "__call__" in vars(value), f"{name} has no example that the tests run"
    if inspect.isclass(value):
        for method, function in inspect.getmembers(value, inspect.isfunction):
            if not method.startswith("_") and function.__module__.startswith("samkern"):
                assert inspect.getdoc(function), f"{name}.{method} has no docstring"


EXAMPLES = [
    path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem.removeprefix("with_") not in INTEGRATIONS
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path):
    if path.stem in ("landscape", "report"):
        all_for_drawing()
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if path.stem in ("ddp", "fsdp") else []
    )
    result = subprocess.run(
        [sys.executable, *launcher, str(path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert "nan" not in result.stdout
    if path.stem in ("accumulate", "compiled"):
        assert "equal up to rounding: True" in result.stdout
        assert "False" not in result.stdout
    if path.stem == "fsdp":
        assert "resumed bit-exact: True" in result.stdout
    if path.stem == "resume":
        assert "bit-exact: True" in result.stdout
        assert "momentum handed over: True" in result.stdout


def test_code_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(without="samkern.integrations")
    if not all(map(importlib.util.find_spec, DRAWING)):
        blocks = [block for block in blocks if not re.search(r"samkern\.(landscape|report)\b", block)]
    assert len(blocks) > 10
    namespace = {}
    # The default backend calls g++ for seconds; examples/compiled.py does.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_the_map_of_the_house_is_the_tree():
    """Every path in the map exists, and no source file is missing from it."""
    block = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    named, folders = set(), []
    for line in block.splitlines():
        indent, text = len(line) - len(line.lstrip()), re.split(r"  +", line.strip())[0]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        for entry in text.split():
            path = ROOT.joinpath(*(folder for _, folder in folders), entry)
            assert path.exists(), f"{path} is in the map but not in the tree"
            if entry.endswith("/"):
                folders.append((indent, entry))
            named.add(path.resolve())
    for pattern in (
        "csrc/**/*.h",
        "csrc/**/*.cpp",
        "csrc/cuda/*.cu",
        "csrc/cuda/*.cuh",
        "samkern/**/*.py",
        "bench/*.py",
        "tests/oracles",
        "examples",
        "triton_kernels",
    ):
        for path in ROOT.glob(pattern):
            covered = path in named or (path.parent in named and path.name in ("__init__.py", "conftest.py"))
            whole_folder = path.parent in named and path.parent.name in (
                "bench",
                "demo",
                "sharpness",
                "examples",
                "tests",
            )
            assert covered or whole_folder, f"{path.relative_to(ROOT)} is not in README's map"


def test_the_table_of_methods_has_every_method():
    methods = [name for name in samkern.__all__ if inspect.isclass(getattr(samkern, name))]
    for name in methods:
        if issubclass(getattr(samkern, name), samkern.SharpnessAware) and name != "SharpnessAware":
            assert f"| `{name}` |" in README


def test_links_in_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_version_is_one():
    assert f'version = "{samkern.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {samkern.__version__}" in (ROOT / "CHANGELOG.md").read_text()


ARROWS = {  # a module may import from the left of itself only
    "reference": set(),
    "shards": set(),
    "tensors": {"shards"},
    "options": set(),
    "lora": {"shards", "tensors"},
    "backends": set(),
    "batchnorm": set(),
    "philox": set(),
    "bitmask": {"reference"},
    "reference_masks": {"philox", "reference"},
    "reference_noise": {"philox", "reference"},
    "reference_plan": {"reference", "reference_noise", "options", "tensors"},
    "sharded_plan": {"options", "plan", "reference", "shards"},
    "sharded_select": {"bitmask", "shards"},
    "plan": {"backends", "bitmask", "options", "reference_plan", "sharded_plan", "shards"},
    "ops": {"backends", "bitmask", "reference", "reference_masks", "reference_noise", "shards", "tensors"},
    "undisturbed": {"batchnorm", "tensors"},
    "extras": set(),
    "files": set(),
    "progress": set(),
    "samples": {"undisturbed"},
    "fisher": {"ops", "progress", "reference", "samples", "shards", "tensors", "undisturbed"},
    "optim": {
        *("backends", "batchnorm", "bitmask", "fisher", "lora", "ops", "options", "philox", "plan", "reference"),
        *("sharded_plan", "sharded_select", "shards", "tensors", "undisturbed"),
    },
    "history": {"optim"},
    "archive": set(),
    "losses": {"archive", "optim", "undisturbed"},
    "reestimate": {"optim"},
    "integrations": {"optim", "shards"},
    "sharpness": {
        *("lora", "ops", "optim", "philox", "progress", "reference", "reference_noise", "shards", "undisturbed"),
    },
    "landscape": {"extras", "files", "progress", "reestimate", "reference", "sharpness", "undisturbed"},
    "reporting": {"backends", "extras", "files", "history", "landscape", "optim", "sharpness"},
    "demo": {
        *("backends", "extras", "fisher", "history", "landscape", "losses", "optim", "reestimate", "reporting"),
        *("sharpness", "undisturbed"),
    },
}


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_run_one_way(room):
    path = ROOT / "samkern" / room
    files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        dots = r"\.\." if path.is_dir() else r"\."
        for module, names in re.findall(rf"^from {dots}(\w*) import ([^\n(]+)", file.read_text(), re.MULTILINE):
            rooms = {module} if module else {name.strip() for name in names.split(",")}
            assert rooms <= ARROWS[room], f"{file.name} imports {rooms - ARROWS[room]}"
    for file in (ROOT / "tests" / "oracles").glob("*.py"):
        assert "samkern" not in file.read_text().replace("Nothing of samkern", "")
