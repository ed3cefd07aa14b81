"""What ``memory()`` says is what is there: every tensor is counted where it is made, in plans in C++ too, whoever holds it."""

import ctypes
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import samkern
from bench.memory import peak_allocated
from samkern.optim import SharpnessAware

from .methods import base_named, each_method, method_named

SGD, SHAPES = torch.optim.SGD, [(300,), (6, 4, 5, 3), (33, 31), (0,), (7,)]


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operations make while they live: those of C++ as well, but not what is freed within one."""

    def __init__(self):
        super().__init__()
        self._storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                storage = x.untyped_storage()
                known = self._storages.get(storage.data_ptr())
                if storage.data_ptr() and (known is None or known[0].expired()):
                    self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def n_bytes(self):
        return sum(n_bytes for storage, n_bytes in self._storages.values() if not storage.expired())


class Watched:
    """An optimizer all of whose tensors are made under a meter. It is checked after every pass and every step."""

    def __init__(self, make, dtype=torch.float32, memory_format=torch.contiguous_format):
        gc.collect()
        self.meter, self.seen, self.slack = LiveTensors(), [], 0
        with self.meter:
            tensors = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
            tensors = [x.contiguous(memory_format=memory_format) if x.dim() == 4 else x for x in tensors]
            self.params = [torch.nn.Parameter(x, requires_grad=len(x) != 7) for x in tensors]
            del tensors
            self.opt = make(self.params)
        self.check()
        self.foretold = self.opt.memory(peak=True)

    def closure(self):
        """Row-major gradients, whatever the layout of the weights."""
        for p in self.params:
            new = torch.randn(p.shape, dtype=p.dtype) if p.requires_grad else None
            p.grad = p.grad.copy_(new) if self.opt.capturable and p.grad is not None else new
        del new
        self.check()
        return 1.0

    def step(self, closures=None, **options):
        with self.meter:
            self.opt.step(closures or self.closure, **options)
        self.check()

    def check(self):
        said = self.opt.memory()
        counted = said.total - self.opt._keeper.held().table_bytes
        assert 0 <= self.meter.n_bytes() - counted <= self.slack, said
        self.seen.append(said)

    def check_foretold(self):
        """Each purpose at its most is what was said before the first step; but ``other``, of which tables come with that."""
        most = samkern.optim.Memory(*map(max, zip(*self.seen, strict=True)))
        assert most._replace(other=0) == self.foretold._replace(other=0)


@pytest.mark.parametrize("name", ["SAM", "ASAM_filter", "LookSAM", "SSAMD", "ARSAM"])
def test_every_tensor_is_counted_and_foretold(backend, name):
    method = method_named(name)
    watched = Watched(lambda params: method.make(params, base_named("momentum"), backend=backend))
    for _ in range(4):
        watched.step()
    watched.check_foretold()
    if backend == "reference":
        assert watched.seen[-1].saved == 0
    before_update = max(watched.seen, key=lambda seen: seen.total)
    assert before_update.saved > 0
    assert before_update.gradients == before_update.first_gradients > 0


@pytest.mark.parametrize("keep_gradients", [True, False])
@pytest.mark.parametrize(
    ("name", "base"),
    [("SAM", "SGD"), ("SAM", "own_step"), ("LookSAM", "Adam"), ("SSAMF_batch", "SGD"), ("GRST", "AdamW")],
)
def test_what_is_held_through_a_second_pass(name, keep_gradients, base):
    method = method_named(name)
    watched = Watched(lambda params: method.make(params, base_named(base), keep_gradients=keep_gradients))
    for _ in range(4):
        watched.step()
    if base != "own_step":  # whose state is not known before it is there
        watched.check_foretold()
    held = max(seen.first_gradients for seen in watched.seen)
    assert (held > 0) == (keep_gradients or name != "SAM")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["LookSAM", "SSAMF_batch", "SSAMD"])
def test_dtypes_and_layouts(name, dtype):
    """Copies of gradients in another layout are gone when the half-step that reads them is: gradients are row-major."""
    method, options = method_named(name), {"cache_dtype": torch.bfloat16} if name == "LookSAM" else {}
    watched = Watched(lambda params: method.make(params, base_named("AdamW"), **options), dtype, torch.channels_last)
    for _ in range(4):
        watched.step()
    foretold, most = watched.foretold, watched.opt.memory()
    assert (foretold.cache, foretold.base_state, foretold.squares) == (most.cache, most.base_state, most.squares)
    n_trained = sum(p.numel() for p in watched.params if p.requires_grad)
    assert most.cache == (2 * n_trained if name == "LookSAM" else 0)


CHOICES = {
    "momentum": lambda params: samkern.MSAM(params, SGD, lr=0.1, momentum=0.9),
    "capturable": lambda params: samkern.SAM(params, SGD, lr=0.1, momentum=0.9, capturable=True),
    "a watched change": lambda params: SharpnessAware(
        params, SGD, lr=0.1, keep_gradients=False, schedule=samkern.optim.Budget(window=3, seed=1)
    ),
    "components": lambda params: samkern.ARSAM(params, SGD, lr=0.1, components="tensor", max_component_age=1),
    "gradient norms": lambda params: samkern.AELookSAM(params, SGD, lr=0.1, total_steps=9),
    "a group apart": lambda params: samkern.LookSAM(
        [{"params": params[:2]}, {"params": params[2:], "rho": 0.0}], SGD, lr=0.1, k=2
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_other_choices(choice):
    watched = Watched(CHOICES[choice])
    for _ in range(4):
        watched.step()
    watched.check_foretold()


def test_what_is_not_perturbed_is_not_saved(backend):
    """Without a gradient, frozen, or of a group with rho = 0."""

    def make(params):
        groups = [{"params": params[:1]}, {"params": params[1:], "rho": 0.0}]
        return samkern.SAM(groups, SGD, lr=0.1, backend=backend)

    watched = Watched(make)
    watched.step()
    assert max(seen.saved for seen in watched.seen) == 4 * 300 if backend == "reference" else 64 * 19


@pytest.mark.parametrize("base", ["momentum", "own_step"])
@pytest.mark.parametrize("hyper", ["secant", "diag"])
def test_a_learned_radius(hyper, base):
    base = base_named(base)

    def make(params):
        radius = samkern.optim.LearnedRadius(0.1, period=2, hyper=hyper)
        return SharpnessAware(params, base.cls, radius=radius, **base.options)

    watched = Watched(make)
    for _ in range(4):
        watched.step(val_closure=watched.closure)
    if base.name != "own_step":
        watched.check_foretold()
    told, fullest = watched.opt.memory(peak=True), max(watched.seen, key=lambda seen: seen.total)
    assert fullest.gradients == told.gradients == 3 * told.first_gradients
    assert fullest.other == told.other


@pytest.mark.parametrize("keep_gradients", [True, False])
def test_several_closures(keep_gradients):
    """Their sums are "other": as large as a gradient."""
    watched = Watched(lambda params: samkern.SAM(params, SGD, lr=0.1, keep_gradients=keep_gradients))
    watched.slack = 4 * 64  # reports of the parts
    for _ in range(2):
        watched.step([watched.closure] * 3)
    most = watched.foretold
    assert max(seen.other for seen in watched.seen) - watched.opt.memory().other >= most.gradients
    assert max(seen.first_gradients for seen in watched.seen) == most.first_gradients


def test_the_halves_and_the_gradients_that_they_free():
    held = []
    for zero_grad in (False, True):
        watched = Watched(lambda params: samkern.SAM(params, SGD, lr=0.1, momentum=0.9))
        with watched.meter:
            watched.closure()
            watched.opt.first_step(zero_grad=zero_grad)
        watched.check()
        held.append(watched.opt.memory().first_gradients)
        with watched.meter:
            watched.closure()
            watched.opt.second_step(zero_grad=True)
        watched.check()
        assert watched.opt.memory().gradients == 0
    assert held[0] == watched.foretold.gradients
    assert held[1] == 0


def test_a_failing_pass_without_its_gradients():
    """Weights and state come back; the gradients, which were not kept, do not."""
    w = torch.nn.Parameter(torch.randn(5))
    opt = samkern.SAM([w], SGD, lr=0.1, momentum=0.9, keep_gradients=False)
    before, passes = w.detach().clone(), []

    def closure():
        passes.append(w.detach().clone())
        if len(passes) == 2:
            raise RuntimeError("out of memory")
        w.grad = torch.ones_like(w)

    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure)
    assert not torch.equal(passes[1], before)
    assert torch.equal(w, before)
    assert w.grad is None
    assert not opt.state


@each_method
def test_kept_or_not_the_weights_are_the_same(method):
    ends = []
    for keep_gradients in (True, False):
        torch.manual_seed(1)
        w = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        opt = method.make(w, base_named("momentum"), keep_gradients=keep_gradients)

        def closure(w=w, opt=opt):
            opt.zero_grad()
            loss = sum((p.square() * (1 + p)).sum() for p in w)
            loss.backward()
            return loss

        for closures in (closure, closure, closure, closure):
            opt.step(closures)
        ends.append([p.detach().clone() for p in w])
    assert all(map(torch.equal, *ends))


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"]
    ]
    _fields_ += [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def test_tables_that_are_no_tensors():
    """By the allocator of the C library: the sums of a million filters are as large as the weights four times over."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("the C library has no mallinfo2")
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo

    def allocated():
        gc.collect()
        info = mallinfo()
        return info.uordblks + info.hblkhd

    start = allocated()
    w = torch.nn.Parameter(torch.randn(1_000_000, 1))
    opt = samkern.ASAM([w], SGD, lr=0.1, momentum=0.9, mode="filter")

    def closure():
        w.grad = torch.ones_like(w)

    opt.step(closure)
    opt.step(closure)
    assert opt.memory().other > 16e6
    assert opt.memory().total == pytest.approx(allocated() - start, rel=0.01)


@pytest.mark.parametrize("keep_gradients", [True, False])
@pytest.mark.parametrize("name", ["SAM", "LookSAM", "SSAMD"])
def test_the_peak_of_a_step_is_what_was_foretold(name, keep_gradients):
    """By torch's allocator, passes and all."""
    method, w = method_named(name), [torch.nn.Parameter(torch.randn(500, 1000)) for _ in range(4)]
    opt = method.make(w, base_named("momentum"), keep_gradients=keep_gradients)
    foretold = opt.memory(peak=True)

    def closure():
        opt.zero_grad()
        for p in w:
            p.grad = torch.ones_like(p)

    peak = peak_allocated(lambda: [opt.step(closure) for _ in range(3)], torch.device("cpu"))
    assert foretold.total - foretold.parameters == pytest.approx(peak, rel=0.01)


def test_of_a_sharded_parameter_the_shard_counts():
    """A quarter of the rows is here; the three other processes are not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        w = torch.nn.Parameter(distribute_tensor(torch.randn(100, 3), mesh, [Shard(0)]))
        opt = samkern.SAM([w], SGD, lr=0.1, momentum=0.9, keep_gradients=False)
        assert opt.memory().parameters == 300
        assert opt.memory(peak=True)[1:-1] == (300, 0, 320, 0, 0, 0, 300, 0)
    finally:
        torch.distributed.destroy_process_group()


def test_the_record_is_plain():
    opt = samkern.SAM([torch.nn.Parameter(torch.ones(3))], SGD, lr=0.1)
    memory = opt.memory()
    assert memory._asdict()["parameters"] == memory.parameters == 12
    assert memory.total == sum(memory._asdict().values())
