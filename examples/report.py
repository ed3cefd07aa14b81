"""Two methods, two seeds each, and a page that compares them: curves, cost, flatness."""

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import samkern

torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
x_test = torch.randn(2048, 8)
y_test = (x_test[:, 0] * x_test[:, 1] > 0).long()
METHODS = {"SAM": samkern.SAM, "LookSAM": samkern.LookSAM}
folder = Path(tempfile.mkdtemp())


def score(model, inputs, labels):
    with torch.no_grad():
        answers = model(inputs)
    right = (answers.argmax(1) == labels).float().mean()
    return nn.functional.cross_entropy(answers, labels), 100 * right


def train(method, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    opt = METHODS[method](model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
    run = samkern.RunFolder(folder / f"{method}-seed{seed}", method=method, seed=seed, settings={"rho": 0.05})
    start = time.perf_counter()
    with run.history(opt) as history:
        for epoch in range(1, 11):
            for indices in torch.randperm(len(x)).split(64):

                def closure(indices=indices):
                    opt.zero_grad()
                    loss = nn.functional.cross_entropy(model(x[indices]), y[indices])
                    loss.backward()
                    return loss

                opt.step(closure)
                history.record()
            seconds = time.perf_counter() - start
            train_loss, train_accuracy = score(model, x, y)
            test_loss, test_accuracy = score(model, x_test, y_test)
            run.epoch(
                epoch,
                steps=opt.steps,
                pairs=opt.evaluations,
                seconds=seconds,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
            )
    run.measure(
        "top eigenvalue", samkern.sharpness.top_eigenvalue(model, nn.functional.cross_entropy, [(x, y)], tol=1e-2)
    )


for method in METHODS:
    for seed in range(2):
        train(method, seed)
print("open this page:", samkern.report(folder, title="SAM and LookSAM"))
