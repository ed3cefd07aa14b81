"""torch.compile of the model: both passes run the same graphs, and nothing is compiled again after the first step."""

import copy

import torch
from torch import nn

import samkern

torch.manual_seed(0)
x, y = torch.randn(256, 20), torch.randint(0, 3, (256,))
eager = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
model = torch.compile(copy.deepcopy(eager))


def train(model):
    # model= is the compiled one: its BatchNorm statistics are then frozen in a way that is no other graph.
    opt = samkern.LookSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, k=5, model=model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = opt.step(closure)  # compiles; the step itself is not for the compiler
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(19):
            schedule.step()
            loss = opt.step(closure)
    return loss.item()


compiled_loss, eager_loss = train(model), train(eager)
print(f"loss {compiled_loss:.6f}, without the compiler {eager_loss:.6f}")
print("equal up to rounding:", abs(compiled_loss - eager_loss) < 1e-4)
