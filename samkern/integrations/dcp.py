"""Checkpoints of sharded training, by ``torch.distributed.checkpoint``: saved on some processes, loaded on as many or others.

Saving takes nothing of samkern, and loading one call, since a new optimizer has no state yet to load into::

    from torch.distributed import checkpoint as dcp

    dcp.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, checkpoint_id="step-1000")

    weights = {"model": model.state_dict()}
    dcp.load(weights, checkpoint_id="step-1000")
    model.load_state_dict(weights["model"])
    samkern.integrations.dcp.load(opt, "step-1000")

``get_optimizer_state_dict`` and its like in ``torch.distributed.checkpoint.state_dict`` know the state of a base optimizer
only: give them ``opt.base``. What a checkpoint of theirs lacks starts fresh.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_into
from torch.distributed.checkpoint.storage import StorageReader

from ..optim import SharpnessAware
from ..optim.keeper import parameters_of
from ..optim.ranks import has_ranks
from ..shards import row_major_zeros

__all__ = ["load"]

# Path of a value in the nested dict that was saved; the keys of dicts are strings there, numbers too.
Path = tuple[str | int, ...]


def load(
    opt: SharpnessAware,
    checkpoint: str | os.PathLike[str] | StorageReader,
    *,
    key: str = "optimizer",
    process_group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Continues from what ``dcp.save({key: opt.state_dict(), ...})`` has written, on any number of processes.

    Parameters may be sharded in another way than those that were saved, or not at all. All processes must call it.

    Args:
        opt: made as the one that was saved, over the same parameters in the same order.
        checkpoint: the folder, or a reader of whatever it was written to.
        key: under which the optimizer was saved.
        process_group: of the processes that call it; None: all.

    Raises:
        ValueError: there is no optimizer under ``key``, or it is of other parameters; ``opt`` is as it was.
        RuntimeError: between ``first_step`` and ``second_step``.

    >>> import tempfile
    >>> from torch.distributed import checkpoint as dcp
    >>> from samkern.integrations.dcp import load
    >>> w = torch.ones(3, requires_grad=True)
    >>> opt, again = (samkern.LookSAM([w], torch.optim.SGD, lr=0.1, k=2) for _ in range(2))
    >>> _ = opt.step(lambda: w.square().sum().backward())
    >>> folder = tempfile.mkdtemp()
    >>> _ = dcp.save({"optimizer": opt.state_dict()}, checkpoint_id=folder, no_dist=True)
    >>> load(again, folder)
    >>> again.steps
    1
    """
    opt.require_idle("dcp.load()")
    reader = checkpoint if isinstance(checkpoint, StorageReader) else FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    paths: Mapping[str, Path] = metadata.planner_data or {}
    ours = {name: path for name, path in paths.items() if path[0] == key}
    if not any(path[1:2] == ("param_groups",) for path in ours.values()):
        there = sorted({str(path[0]) for path in paths.values()})
        raise ValueError(f"the checkpoint has no state of an optimizer under {key!r}; it has {', '.join(there)}")
    params = parameters_of(opt.base)
    values = {name: _to_fill(metadata, name, path, params) for name, path in ours.items()}
    load_into(values, storage_reader=reader, process_group=process_group, no_dist=not has_ranks())
    nested: dict[Any, Any] = {"state": {}}
    for name, path in ours.items():
        _put(nested, path[1:], values[name])
    opt.load_state_dict(nested)


def _to_fill(metadata: Metadata, name: str, path: Path, params: Sequence[Tensor]) -> Any:
    """What the value at ``path`` is read into: spread as its parameter is if it has an entry for each of the parameter's."""
    stored = metadata.state_dict_metadata[name]
    if not isinstance(stored, TensorStorageMetadata):
        return None
    dtype = stored.properties.dtype
    # state / index / name, or samkern / cache / index
    index = {"state": path[2:3], "samkern": path[3:4]}.get(str(path[1]), ())
    if index and str(index[0]).isdigit() and int(index[0]) < len(params):
        p = params[int(index[0])]
        if p.dim() > 0 and stored.size == p.shape:
            return row_major_zeros(p, dtype)
    return torch.zeros(stored.size, dtype=dtype)


def _put(into: Any, path: Path, value: Any) -> None:
    """Sets ``into[path[0]][path[1]]... = value``, and makes the dicts and lists on the way."""
    for step, following in zip(path, (*path[1:], None), strict=True):
        place: Any = int(step) if isinstance(step, str) and step.isdigit() else step
        if isinstance(into, list):
            into += [None] * (place + 1 - len(into))
        there = into[place] if isinstance(into, list) else into.get(place)
        if following is None:
            there = value
        elif there is None:
            there = [] if isinstance(following, int) else {}
        into[place] = there
        into = there
