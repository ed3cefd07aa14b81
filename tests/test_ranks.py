"""The pool of ranks itself: what fails, dies or hangs on one of them is an error that says where, and the next run is sound."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from .ranks import RankError


def total(x):
    total = torch.tensor([x * (1 + dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item(), torch.get_num_threads()


def raise_on_last():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last one")
    return total(1.0)


def die_on_last():
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return total(1.0)


def hang_on_last():
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(60)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_function_runs_on_every_rank(ranks, n):
    assert ranks.run(n, total, 2.0) == [(i, n, n * (n + 1.0), 1) for i in range(n)]


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (raise_on_last, "ValueError: the last one"),
        (die_on_last, "ended with code -9"),
        (hang_on_last, "in hang_on_last"),
    ],
)
def test_an_error_tells_its_rank_and_its_place(ranks, function, where):
    with pytest.raises(RankError, match="rank 1 of 2: ") as error:
        ranks.run(2, function, timeout=4.0 if function is hang_on_last else 60.0)
    assert where in str(error.value)
    assert ranks.run(2, total, 1.0) == [(i, 2, 3.0, 1) for i in range(2)]
