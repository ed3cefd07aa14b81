"""The whole family on one small task: test accuracy against what it took. 40 % of the training labels are wrong."""

import time

import torch
from torch import nn

import samkern
from samkern.optim import Blend, EveryK

STEPS, BATCH = 200, 64
METHODS = {
    "SGD": (torch.optim.SGD, {}),
    "SAM": (samkern.SAM, {"rho": 0.5}),
    "ASAM": (samkern.ASAM, {"rho": 3.0}),
    "SAMk": (samkern.SAMk, {"rho": 0.5, "k": 5}),
    "LookSAM": (samkern.LookSAM, {"rho": 0.5, "k": 5}),
    "LookLayerSAM": (samkern.LookLayerSAM, {"rho": 0.05, "k": 5}),
    "RST": (samkern.RST, {"rho": 0.5, "schedule": "piecewise-1", "total_steps": STEPS}),
    "GRST": (samkern.GRST, {"rho": 0.5, "p": 0.25, "gamma": "match"}),
    "AESAM": (samkern.AESAM, {"rho": 0.5, "total_steps": STEPS}),
    "AELookSAM": (samkern.AELookSAM, {"rho": 0.5, "total_steps": STEPS, "rule": "R3"}),
    "ARSAM": (samkern.ARSAM, {"rho": 0.5, "window": 20, "max_rate": 0.2, "beta": 0.9, "max_age": None}),
    "SSAMF": (samkern.SSAMF, {"rho": 0.7, "fisher": "batch", "refresh_interval": 40}),
    "SSAMD": (samkern.SSAMD, {"rho": 0.7, "total_steps": STEPS, "refresh_interval": 40}),
    "LETSSAM": (samkern.LETSSAM, {"rho": 0.4}),
    "LETSASAM": (samkern.LETSASAM, {"rho": 2.0, "rho_max": 4.0}),
    "MSAM": (samkern.MSAM, {"rho": 3.0}),
    "own mix": (  # a look on every 4th step, four times as strong
        samkern.SharpnessAware,
        {"radius": 0.5, "schedule": EveryK(4), "reuse": Blend(4.0)},
    ),
}


def data(n, seed, wrong):
    """Points around the corners of a cube; the class is the corner. ``wrong``: share of labels from elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(8, (n,), generator=generator)
    corner = torch.stack([y % 2, y // 2 % 2, y // 4], 1) * 2.0 - 1
    x = torch.cat([corner, torch.zeros(n, 17)], 1) + 0.5 * torch.randn(n, 20, generator=generator)
    shift = torch.randint(1, 8, (n,), generator=generator) * (torch.rand(n, generator=generator) < wrong)
    return x, (y + shift) % 8


def train(method, options):
    """Test accuracy in per cent, forward-backward pairs and milliseconds per step."""
    torch.manual_seed(0)
    x, y = data(512, seed=0, wrong=0.4)
    test_x, test_y = data(2000, seed=1, wrong=0.0)
    val = torch.arange(512 - BATCH, 512)  # LETS learns its radius on these, and trains on the others
    n = len(y) - BATCH if "LETS" in method.__name__ else len(y)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    opt = method(model.parameters(), lr=0.1, momentum=0.9, **options)
    pairs = 0

    def closure_of(indices):
        def closure():
            nonlocal pairs
            pairs += 1
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x[indices]), y[indices])
            loss.backward()
            return loss

        return closure

    start = time.perf_counter()
    for step in range(STEPS):
        indices = torch.randint(n, (BATCH,), generator=torch.Generator().manual_seed(step))
        others = {"val_closure": closure_of(val)} if n < len(y) else {}
        opt.step(closure_of(indices), **others)
    seconds = time.perf_counter() - start
    accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
    return 100 * accuracy, pairs / STEPS, 1e3 * seconds / STEPS


torch.set_num_threads(1)  # the net is too small to share
train(torch.optim.SGD, {})  # warms up
print("method         test %  pairs/step  ms/step")
for name, (method, options) in METHODS.items():
    base = {} if method is torch.optim.SGD else {"base": torch.optim.SGD}
    accuracy, pairs, milliseconds = train(method, {**base, **options})
    print(f"{name:<14} {accuracy:6.1f}  {pairs:10.2f}  {milliseconds:7.2f}")
