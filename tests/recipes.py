"""What is written of an integration, run by its own test file: its package is slow to import."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
from pathlib import Path

import torch

import samkern

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python_blocks(mentioning: str = "", *, without: str = "\0") -> list[str]:
    """The Python code of README's blocks."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return [block for block in blocks if mentioning in block and without not in block]


def run_all_about(name: str, tmp_path: Path, monkeypatch, capsys) -> str:
    """Runs docstrings, README and example of ``samkern.integrations.<name>`` in a folder of its own. Returns its prints."""
    monkeypatch.chdir(tmp_path)
    module = f"samkern.integrations.{name}"
    result = doctest.testmod(importlib.import_module(module), extraglobs={"samkern": samkern, "torch": torch})
    assert result.attempted
    assert not result.failed
    blocks = python_blocks(module)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"torch": torch, "samkern": samkern, "__name__": "README"})
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / f"with_{name}.py"), run_name="__main__")
    printed: str = capsys.readouterr().out
    assert printed
    assert "nan" not in printed
    return printed
