"""Fixtures of all tests: seeds, and the backends that can run here. How tests are spread over processes, by pytest-xdist."""

import collections
import contextlib
import importlib.util
import os
import warnings

import pytest
import torch

import samkern
from samkern.backends import in_interpreter

from . import emulator, once
from .browser import browser, page  # noqa: F401
from .methods import BASES, METHODS
from .ranks import Ranks

ON_GPU = torch.cuda.is_available()
BUILT = [name for name, backend in samkern.backends().items() if backend.available]
# Without a GPU its kernels run on the CPU, thread by thread. Triton's run in its interpreter if TRITON_INTERPRET=1.
EMULATED = "cuda" not in BUILT and not emulator.why_not()
AVAILABLE = [*BUILT, *(["cuda"] if EMULATED else [])]
# What is decided above the plan; of its tests Triton's interpreter takes one in so many.
ABOVE_THE_PLAN = {
    **dict.fromkeys(("test_ssam.py", "test_schedules.py", "test_choices.py"), 16),
    **dict.fromkeys(("test_amp.py", "test_arsam.py", "test_lets.py", "test_msam.py", "test_parts.py"), 16),
    **dict.fromkeys(("test_state.py", "test_faults.py", "test_step.py", "test_theory.py"), 4),
    **dict.fromkeys(("test_averaging.py", "test_lpf.py", "test_swad.py"), 16),
}
# Kernels that Triton's interpreter has cells of its own for, in triton_*_interpreted.py.
WITH_CELLS_OF_ITS_OWN = dict.fromkeys(("test_masks.py", "test_noise.py", "test_average.py", "test_passes.py"), 3)
_taken = collections.Counter()  # tests by backend
_left_out = []  # ids of tests

if ON_GPU:  # many tests compare whole trainings bit by bit
    torch.backends.cudnn.deterministic = True


def _repair_ranges():
    """``range`` over a tensor in Triton 3.6: it converts an array of one entry, which NumPy refuses since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *args):
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if in_interpreter() and importlib.util.find_spec("triton") is not None:
    _repair_ranges()


@contextlib.contextmanager
def _one_thread():
    """Kernels for GPUs take one thread on the CPU: others would only spin between torch's small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def on(name):
    """Tensors are made where backend ``name`` can take them."""
    _taken[name] += 1
    if name == "cuda" and on_cpu(name):
        with _one_thread(), emulator.running():
            yield name
    elif on_cpu(name):
        with _one_thread():
            yield name
    elif ON_GPU and name in ("cuda", "triton"):
        with torch.device("cuda"):
            yield name
    else:
        yield name


def on_cpu(name):
    """Whether backend ``name`` is one for GPUs whose kernels run on the CPU here."""
    return (name == "cuda" and EMULATED) or (name == "triton" and in_interpreter())


def thinned(items):
    """What to run where kernels for GPUs run on the CPU: a test has hundreds of cells, and one of them takes seconds.

    The emulator takes a diagonal of each grid of methods and bases, so that every method and every base has its turn, and so
    does the reference, which every other backend is compared with. Of files about what is decided above the plan both take
    one cell in three of what is left. Triton's interpreter, many times slower, takes one cell of each test, another one in
    every test, and of those files and of kernels that it has other cells for some tests only.
    """
    cells = collections.defaultdict(list)
    above = collections.Counter()  # by backend
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        name, method, base = (params.get(key) for key in ("backend", "method", "base"))
        if on_cpu("triton") and "triton" in (name, params.get("fast")):
            cells[item.path, item.originalname].append(item)
        elif on_cpu(name) or name == "reference":
            is_cell = method in METHODS and base in BASES
            if is_cell and (METHODS.index(method) - BASES.index(base)) % len(BASES) != 0:
                continue
            above[name] += item.path.name in ABOVE_THE_PLAN
            if item.path.name not in ABOVE_THE_PLAN or above[name] % 3 == 0:
                yield item
        else:
            yield item
    for i, ((path, _), same_test) in enumerate(cells.items()):
        if i % {**ABOVE_THE_PLAN, **WITH_CELLS_OF_ITS_OWN}.get(path.name, 1) == 0:
            yield same_test[i % len(same_test)]


def pytest_collection_modifyitems(config, items):
    """``SAMKERN_ALL_GRIDS=1`` leaves out nothing: half an hour more, and hours for the interpreter."""
    addresses = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if addresses:
        raise pytest.UsageError(f"an address is another one in each process; give an id without it to {addresses[0]}")
    if os.environ.get("SAMKERN_ALL_GRIDS") != "1":
        kept = set(thinned(items))
        left_out = [item for item in items if item not in kept]
        config.hook.pytest_deselected(items=left_out)
        _left_out[:] = [item.nodeid for item in left_out]
        items[:] = [item for item in items if item in kept]
    if in_worker(config):
        items[:] = longest_first(items)


# ---- in several processes, by pytest-xdist


def in_worker(config):
    """Whether these tests are some of those that a controller has spread over processes."""
    return hasattr(config, "workerinput")


def longest_first(items):
    """So that none is left over when the other processes are done. A short one after each: tests are handed out in pairs."""
    seconds = {item: getattr(item.get_closest_marker("takes"), "args", [0])[0] for item in items}
    long = sorted(filter(seconds.get, items), key=seconds.get, reverse=True)
    short = [item for item in items if not seconds[item]]
    pairs = [item for pair in zip(long, short, strict=False) for item in pair]
    return [*pairs, *long[len(short) :], *short[len(long) :]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """``-n auto``: a process per core. A GPU is for one process: what tests measure on it is theirs."""
    return 0 if ON_GPU else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    """What the workers inherit: their share of the cores, and a folder for what one of them compiles for all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(specs))))
    once.share()


def pytest_sessionfinish(session):
    if in_worker(session.config):
        session.config.workeroutput.update(taken=dict(_taken), left_out=_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds up what the summary tells. A worker that crashed leaves nothing; its test has failed."""
    output = getattr(node, "workeroutput", {})
    _taken.update(output.get("taken", {}))
    _left_out[:] = output.get("left_out", _left_out)  # the same in every worker


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    # Random half-precision parameters are what many tests are about.
    warnings.filterwarnings("ignore", message="half-precision weights lose perturbations")


@pytest.fixture(params=AVAILABLE)
def backend(request):
    with on(request.param) as name:
        yield name


@pytest.fixture(params=[name for name in AVAILABLE if name != "reference"])
def fast(request):
    """A backend to compare with the reference."""
    with on(request.param) as name:
        yield name


@pytest.fixture(scope="session")
def ranks():
    """Processes of a distributed training: ``ranks.run(2, function, *args)``."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no torch.distributed with gloo")
    pool = Ranks()
    yield pool
    pool.close()


def pytest_report_header():
    return samkern.info().splitlines()


def pytest_terminal_summary(terminalreporter):
    """How each backend was tested. ``test_triton.py`` counts the tests that ran in a process of their own."""
    passed = terminalreporter.stats.get("passed", [])
    elsewhere = dict(value for report in passed for value in getattr(report, "user_properties", []))
    for name, backend in samkern.backends().items():
        if _taken[name]:
            how = "its kernels compiled for the CPU and emulated" if name == "cuda" and EMULATED else backend.why
            line = f"tested, {_taken[name]} times: {how}"
        elif name in elsewhere:
            line = f"tested, {elsewhere[name]} times: interpreted on the CPU in a process of its own"
        elif name in AVAILABLE:
            line = "not tested: it could be, but no test that was run takes it"
        else:
            why_not_emulated = f"; nor can it be emulated: {emulator.why_not()}" if name == "cuda" else ""
            line = f"not tested: {backend.why}{why_not_emulated}"
        terminalreporter.write_line(f"backend {name:<10} {line}")
    if _left_out:
        terminalreporter.write_line(f"{len(_left_out)} cells of grids left out; SAMKERN_ALL_GRIDS=1 runs them")
