"""All that is measured on a GPU, and the bars that it has to meet. `python -m bench.gpu_steps`

    shares of the copy rate   every half-step and list op, 1e8 fp32 parameters and ViT-B/16 in bf16   gpu_half_steps.py
    host time, launches       of a half-step, ResNet-50's 161 tensors, idle device                    gpu_half_steps.py
    masks                     perturbed through one, and one selected, against torch.topk             gpu_masks.py
    whole steps               against _foreach, an eager loop, torch.compile, pytorch_optimizer       gpu_whole_steps.py
    training                  SAM and LookSAM against SGD, ResNet-18                                  gpu_training.py

What is wrong is not timed. By worth, for as long as ``--seconds`` last; rows go to ``steps.csv`` in the machine's folder, and
the table of bars comes last. ``--smoke --device cpu`` runs all of it on tiny inputs and proves nothing but that.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from . import shapes
from .gpu_half_steps import host_time, launches, list_ops, roofline
from .gpu_masks import masks
from .gpu_rows import table, write
from .gpu_session import Case, Session
from .gpu_training import training
from .gpu_whole_steps import COMPILES, whole_steps
from .machine import folder

SMOKE = shapes.ShapeSet("smoke", [(5, 3), (0,), (70,), (9, 2)], rounds=2)


def measure(session: Session) -> None:
    """Every section, while there is time."""
    smoke = session.smoke
    large = (
        [Case(SMOKE), Case(SMOKE, torch.bfloat16)]
        if smoke
        else [
            Case(shapes.LARGE),
            Case(shapes.VIT_B, torch.bfloat16),
        ]
    )
    usual = Case(SMOKE if smoke else shapes.RESNET50)
    sets = [Case(SMOKE)] if smoke else [*map(Case, shapes.ON_GPU), Case(shapes.VIT_B, torch.bfloat16)]
    compiles = [case for case in sets if case.shape_set.name in COMPILES]

    def steps(case: Case) -> None:
        name = f"whole steps, {case.name}"
        session.section(name, 4, lambda: whole_steps(session, case, seconds=0.1 if smoke else 2.5))

    for case in large:
        name = f"half-steps at the copy rate, {case.name}"
        session.section(name, 10, partial(roofline, session, case, rounds=2 if smoke else 12))
    for case in large:
        session.section(f"masks, {case.name}", 6, partial(masks, session, case, rounds=2 if smoke else 8))
    session.section("host time", 5, lambda: host_time(session, usual, repeats=3 if smoke else 200))
    for case in sets:
        if case not in compiles:
            steps(case)
    session.section("training", 15, lambda: training(session))
    for case in large:
        name = f"list ops, {case.name}"
        session.section(name, 6, partial(list_ops, session, case, rounds=2 if smoke else 8))
    # torch.compile takes what is left, but for the launches, which come last.
    for case in compiles:
        steps(case)
    session.section("launches", 3, lambda: launches(session, usual))


def main(arguments: list[str] | None = None) -> int:
    """Measures, appends to ``steps.csv`` and prints the bars. Returns 1 if something failed; a missed bar is no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=160)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    session = Session(device, time.perf_counter() + options.seconds - 5, options.smoke)
    try:
        measure(session)
    except KeyboardInterrupt:
        session.note("interrupted")
    path = (options.out or folder(device)) / "steps.csv"
    write(session.rows, path)
    print(f"written: {path}\n")
    for note in session.notes:
        print(note)
    print(table(session.rows))
    return 1 if session.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
