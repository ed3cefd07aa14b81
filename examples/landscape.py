"""What lies between two trainings, and around one: a barrier, contours in print, and a page to turn the surface on."""

import argparse
import copy
import pathlib
import tempfile

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import samkern

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=pathlib.Path, help="folder for the files; else a temporary one")
args = parser.parse_args()

torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
batches = list(zip(x.split(64), y.split(64), strict=True))


def train(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
    states = [copy.deepcopy(model.state_dict())]
    for _ in range(8):
        for inputs, labels in batches:

            def closure(inputs=inputs, labels=labels):
                opt.zero_grad()
                loss = cross_entropy(model(inputs), labels)
                loss.backward()
                return loss

            opt.step(closure)
        states.append(copy.deepcopy(model.state_dict()))
    return model, states


with tempfile.TemporaryDirectory() as temporary:
    out = args.out or pathlib.Path(temporary)
    out.mkdir(parents=True, exist_ok=True)
    (model, states), (_, others) = train(1), train(2)

    between = samkern.landscape.interpolate(
        model, cross_entropy, batches, states[-1], others[-1], reestimate=True, title="two seeds"
    )
    between.figure().savefig(out / "between.pdf")
    print(f"between two seeds: losses {between.loss[0]:.3f} and {between.loss[-1]:.3f}, barrier {between.barrier:.3f}")

    # Interrupted, the same call goes on where it was.
    around = samkern.landscape.surface(model, cross_entropy, batches, points=11, file=out / "around.npz", title="SAM")
    around.figure().savefig(out / "around.pdf")
    print(f"around the weights: loss {around.loss[5, 5]:.3f} amid, {around.loss.max():.3f} at most")

    course = samkern.landscape.trajectory(
        model, cross_entropy, batches, states, points=11, reestimate=True, title="training"
    )
    page = course.html(out / "training.html")
    print(f"the training, along the {course.labels[0]}: {page.name}, {page.stat().st_size / 1e6:.0f} MB")
