"""SAF: the loss beside its oracle, and an archive that loaders, restarts and second passes do not confuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import samkern

from .oracles import losses
from .problems import batch, flat, make_net

N, C = 37, 5


class Samples(Dataset):
    """Sample i is the number i."""

    def __init__(self, n=N):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor(float(i)), i % C


def answers(x, epoch):
    """Logits that tell the sample and the epoch."""
    return torch.stack([torch.sin(x * (c + 1) + epoch) for c in range(C)], 1)


def loader_of(seed, workers=0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"batch_size": 8, "shuffle": True, "drop_last": True, "generator": generator, **options}
    return DataLoader(samkern.Indexed(Samples()), num_workers=workers, **options)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_loss_is_the_formula(kind, tmp_path):
    path = tmp_path / "logits" if kind == "file" else None
    options = {"lam": 0.7, "tau": 2.0, "start_epoch": 2, "lag": 2}
    saf, oracle = samkern.SAFLoss(N, C, path=path, **options), losses.SAF(**options)
    active = 0
    for saf.epoch in range(7):
        for (x, y), index in loader_of(saf.epoch):
            z = answers(x, saf.epoch).requires_grad_()
            loss = saf(z, y, index)
            expected_z = z.detach().clone().requires_grad_()
            expected = oracle(saf.epoch, expected_z, y, index)
            torch.testing.assert_close(loss.double(), expected.double(), rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(*(torch.autograd.grad(f, v)[0] for f, v in ((loss, z), (expected, expected_z))))
            active += loss.item() > torch.nn.functional.cross_entropy(z, y).item()
    assert active > 10


def test_a_shuffled_loader_with_workers_that_drops_the_last(tmp_path):
    """The archive has exactly the samples that were seen, each with its own logits."""
    saf = samkern.SAFLoss(N, C, start_epoch=0, lag=1, path=tmp_path / "logits")
    for saf.epoch in range(2):
        seen = torch.zeros(N, dtype=torch.bool)
        for (x, y), index in loader_of(10 + saf.epoch, workers=2):
            assert torch.equal(index.float(), x)
            saf(answers(x, saf.epoch), y, index)
            seen[index] = True
        assert 0 < (~seen).sum() == N % 8
        logits, there = saf.archive.read(saf.epoch, torch.arange(N))
        assert torch.equal(there, seen)
        assert torch.equal(logits[seen], answers(torch.arange(float(N)), saf.epoch)[seen])
    assert saf.archive.filled(0) == saf.archive.filled(1) == N - N % 8


def test_items_of_a_data_set_that_gives_batches():
    class Batched(Samples):
        calls = 0

        def __getitems__(self, indices):
            Batched.calls += 1
            return [self[i] for i in indices]

    data = samkern.Indexed(Subset(Batched(), range(5, 15)))
    [((x, _), index), *_] = DataLoader(data, batch_size=4)
    assert x.tolist() == [5, 6, 7, 8]
    assert index.tolist() == [0, 1, 2, 3]
    assert Batched.calls > 0
    assert data[-1][1] == 9
    assert not hasattr(samkern.Indexed(TensorDataset(torch.zeros(3))), "no_such_thing")
    with pytest.raises(TypeError, match="dataset must have a length and items"):
        samkern.Indexed(iter([1, 2]))


def epochs(saf, begin, end):
    values = []
    for saf.epoch in range(begin, end):
        for (x, y), index in loader_of(saf.epoch):
            values.append(saf(answers(x, saf.epoch), y, index))
    return torch.stack(values)


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("how", ["state_dict", "pickle"])
def test_a_restart(kind, how, tmp_path):
    options = {"start_epoch": 1, "lag": 2}

    def make(name):
        return samkern.SAFLoss(N, C, path=tmp_path / name if kind == "file" else None, **options)

    whole = epochs(make("one"), 0, 8)
    saf = make("two")
    first = epochs(saf, 0, 4)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(saf))
    else:
        state = copy.deepcopy(saf.state_dict())
        again = make("two")
        again.load_state_dict(state)
    if kind == "file":
        assert sum(x.numel() for x in saf.state_dict()["archive"].values() if isinstance(x, torch.Tensor)) == 0
    del saf
    assert torch.equal(torch.cat([first, epochs(again, 4, 8)]), whole)


def test_a_file_that_was_written_beyond_the_checkpoint(tmp_path):
    """What a later epoch has overwritten is missing, and is not taken for what it was."""
    options = {"start_epoch": 0, "lag": 1, "path": tmp_path / "logits"}
    saf = samkern.SAFLoss(N, C, **options)
    epochs(saf, 0, 2)
    state = saf.state_dict()
    index = torch.arange(4)
    saf.epoch = 2
    saf(answers(index.float(), 2), index, index)  # in the slot of epoch 0
    again = samkern.SAFLoss(N, C, **options)
    again.load_state_dict(state)
    assert again.epoch == 1
    _, there = again.archive.read(0, torch.arange(N))
    assert not there[:4].any()
    assert there.any()


def test_two_that_share_a_file(tmp_path):
    options = {"start_epoch": 0, "lag": 1, "path": tmp_path / "logits"}
    ours, theirs = samkern.SAFLoss(N, C, **options), samkern.SAFLoss(N, C, **options)
    index = torch.arange(4)
    ours.archive.write(0, index, answers(index.float(), 0))
    assert torch.equal(theirs.archive.read(0, index)[0], answers(index.float(), 0))


def test_second_passes_do_not_count():
    """Of a SAM step the archive has the answers at w, not those at w + eps."""
    net = make_net(torch.float32)
    x, y = (part[:6] for part in batch(0, torch.float32))
    saf = samkern.SAFLoss(6, C, start_epoch=0, lag=1)
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, model=net)
    first = []

    def closure():
        opt.zero_grad()
        logits = net(x)
        first.append(logits.detach())
        loss = saf(logits, y, torch.arange(6))
        loss.backward()
        return loss

    for saf.epoch in range(2):
        first.clear()
        opt.step(closure)
        assert len(first) == 2
        assert not torch.equal(*first)
        assert torch.equal(saf.archive.read(saf.epoch, torch.arange(6))[0], first[0])
    assert flat(net).isfinite().all()


def test_the_ring():
    """Slots are used again after lag + 1 epochs; what is too old is not there."""
    archive = samkern.LogitArchive(3, 2, lag=2)
    for epoch in range(5):
        archive.write(epoch, torch.tensor([1]), torch.full((1, 2), float(epoch)))
    index = torch.arange(3)
    for epoch in range(5):
        logits, there = archive.read(epoch, index)
        assert there.tolist() == [False, epoch > 1, False]
        assert logits[1].tolist() == [epoch if epoch > 1 else 0.0] * 2


def test_only_what_will_be_read_is_written():
    saf = samkern.SAFLoss(N, C, start_epoch=5, lag=3)
    filled = []
    for saf.epoch in range(5):
        for (x, y), index in loader_of(0):
            saf(answers(x, saf.epoch), y, index)
        filled.append(saf.archive.filled(saf.epoch))
    assert filled == [0, 0, 0, N - N % 8, N - N % 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    archive = samkern.LogitArchive(2, 3, dtype=dtype)
    z = torch.tensor([[1e6, -1e6, 1.0], [0.1, 0.2, 0.3]])
    archive.write(0, torch.tensor([0, 1]), z)
    kept, _ = archive.read(0, torch.tensor([0, 1]))
    assert kept.dtype == torch.float32
    assert kept.isfinite().all()
    largest = torch.finfo(torch.float16).max
    expected = z.clamp(-largest, largest) if dtype == torch.float16 else z
    assert torch.equal(kept, expected.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_answers_that_are_not_finite_are_not_kept(dtype, bad):
    saf = samkern.SAFLoss(3, C, start_epoch=0, lag=1, dtype=dtype)
    x, index = torch.arange(3.0), torch.arange(3)
    broken = answers(x, 0)
    broken[1, 0] = bad
    saf(broken, index, index)
    assert saf.archive.filled(0) == 2
    saf(answers(x, 0), index, index)  # the first finite one counts
    assert saf.archive.filled(0) == 3
    saf.epoch = 1
    assert saf(answers(x, 1), index, index).isfinite()


def test_of_a_sample_that_a_batch_has_twice_the_first_answer_counts():
    archive = samkern.LogitArchive(4, 1)
    archive.write(0, torch.tensor([2, 0, 2, 2, 0]), torch.arange(5.0)[:, None])
    kept, there = archive.read(0, torch.arange(4))
    assert kept.flatten().tolist() == [1, 0, 0, 0]
    assert there.tolist() == [True, False, True, False]


def test_equal_answers_add_nothing():
    saf = samkern.SAFLoss(4, C, start_epoch=0, lag=1)
    x = torch.arange(4.0)
    for saf.epoch in range(2):
        z = answers(x, 0).requires_grad_()
        loss = saf(z, torch.arange(4), torch.arange(4))
    assert loss == torch.nn.functional.cross_entropy(z, torch.arange(4))
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(z, torch.arange(4)), z)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], plain, rtol=1e-5, atol=1e-7)


def test_half_precision_logits():
    saf = samkern.SAFLoss(4, C, start_epoch=0, lag=1)
    saf.archive.write(0, torch.arange(4), answers(torch.arange(4.0), 0))
    saf.epoch = 1
    z = answers(torch.arange(4.0), 1)
    losses_of = [saf(z.to(dtype), torch.arange(4), torch.arange(4)) for dtype in (torch.float32, torch.bfloat16)]
    torch.testing.assert_close(losses_of[1].float(), losses_of[0], rtol=2e-2, atol=0)


def test_the_budget():
    needed = samkern.LogitArchive(50_000, 10).n_bytes
    assert needed == pytest.approx(4 * 50_000 * (10 + 1) * 4, rel=1e-3)  # logits and tags
    assert samkern.LogitArchive(50_000, 10, max_bytes=needed).n_bytes == needed
    with pytest.raises(
        ValueError, match=rf"max_bytes={needed - 1:,}, and 4 epochs of 50,000 samples .* take {needed:,}"
    ):
        samkern.SAFLoss(50_000, 10, max_bytes=needed - 1)


def test_a_file_takes_what_it_says(tmp_path):
    archive = samkern.LogitArchive(N, C, dtype=torch.bfloat16, path=tmp_path / "logits")
    assert (tmp_path / "logits").stat().st_size == archive.n_bytes


def test_a_stream_has_no_places():
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 4

        def __iter__(self):
            return iter(range(4))

    with pytest.raises(TypeError, match=r"dataset must have a length and items.*got Stream"):
        samkern.Indexed(Stream())


def test_what_is_refused(tmp_path):
    saf = samkern.SAFLoss(N, C, start_epoch=0)
    z, y = torch.zeros(2, C), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"index must be integers of shape \(B,\).*got torch.float32"):
        saf(z, y, torch.zeros(2))
    with pytest.raises(ValueError, match=r"index must be from 0 to 36, got 0 to 37"):
        saf(z, y, torch.tensor([0, N]))
    with pytest.raises(ValueError, match=r"index must be from 0 to 36, got -1"):
        saf(z, y, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"logits must be of shape \(2, 5\)"):
        saf(torch.zeros(2, C + 1), y, torch.tensor([0, 1]))
    assert saf.archive.filled(0) == 0
    with pytest.raises(ValueError, match="epoch must be an integer >= 0, got -1"):
        saf.epoch = -1
    for options, said in (
        ({"lam": -1.0}, "lam must be a finite number >= 0"),
        ({"tau": 0.0}, "tau must be a finite number > 0"),
        ({"lag": 0}, "lag must be an integer >= 1"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"start_epoch": 1.5}, "start_epoch must be an integer"),
    ):
        with pytest.raises(ValueError, match=said):
            samkern.SAFLoss(N, C, **options)
    (tmp_path / "notes").write_text("something else entirely")
    with pytest.raises(ValueError, match="is the file of something else, 'something else entirely'"):
        samkern.SAFLoss(N, C, path=tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "something else entirely"
    (tmp_path / "image").write_bytes(bytes(5000) + b"precious")
    with pytest.raises(ValueError, match="is the file of something else, ''"):
        samkern.SAFLoss(N, C, path=tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == bytes(5000) + b"precious"
    samkern.SAFLoss(N, C, path=tmp_path / "logits")
    with pytest.raises(ValueError, match="is the file of something else"):
        samkern.SAFLoss(N, C, lag=2, path=tmp_path / "logits")
    with pytest.raises(ValueError, match="the checkpoint is of another archive"):
        saf.load_state_dict(samkern.SAFLoss(N, C + 1, start_epoch=0).state_dict())
