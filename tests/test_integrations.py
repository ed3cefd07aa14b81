"""What all integrations share; those of a package are tested in files of their own."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import samkern
from samkern.integrations import MissingPackageError
from samkern.integrations.passes import MicroBatches, sharpness_aware

PACKAGES = ["lightning", "transformers", "accelerate"]


def test_samkern_imports_none_of_them():
    code = f"import sys, samkern, samkern.integrations; print({set(PACKAGES)} & {{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_names_its_extra(package, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == package or name == f"samkern.integrations.{package}":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(
        MissingPackageError, match=rf"{package} needs {package}.*pip install samkern\[{package}\]"
    ) as error:
        importlib.import_module(f"samkern.integrations.{package}")
    assert error.value.name == package
    assert isinstance(error.value, ImportError)


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_wrappers_are_looked_into():
    opt = samkern.SAM(nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1)
    assert sharpness_aware(Wrapper(Wrapper(opt))) is opt
    with pytest.raises(TypeError, match="one of samkern's, got SGD"):
        sharpness_aware(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))


@pytest.mark.parametrize("failing", ["first", "second"])
def test_a_pass_that_fails_leaves_the_weights(failing):
    w = nn.Parameter(torch.ones(2))
    opt = samkern.SAM([w], torch.optim.SGD, lr=0.1, rho=0.1)
    batches = MicroBatches()

    def evaluate(batch):
        if not torch.equal(w, torch.ones(2)):
            raise OSError("second pass")
        (w * batch).sum().backward()

    batches.first(opt, evaluate, 1.0)
    if failing == "first":
        with pytest.raises(TypeError):
            batches.first(opt, evaluate, "no number")
        assert batches.last is None
    else:
        with pytest.raises(OSError, match="second pass"):
            batches.second(opt, evaluate)
    assert torch.equal(w, torch.ones(2))
    assert torch.equal(w.grad, torch.ones(2))
    opt.first_step()  # nothing is under way
