"""A whole step, forward and backward passes included, as a CUDA graph. Needs a GPU."""

import torch
from torch.nn import functional as F

import samkern

if not torch.cuda.is_available():
    print("this example needs a GPU that torch can use")
    raise SystemExit

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)).cuda()
opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, capturable=True)
x, y = torch.randn(128, 20, device="cuda"), torch.randint(0, 3, (128,), device="cuda")


def closure():
    opt.zero_grad(set_to_none=False)  # gradients must stay where they are
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


# Some steps before, on a stream of their own, make everything that a step needs.
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    for _ in range(3):
        opt.step(closure)
torch.cuda.current_stream().wait_stream(stream)

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = opt.step(closure)

for epoch in range(3):
    opt.param_groups[0]["lr"].fill_(0.1 / (epoch + 1))  # read anew by every replay; torch's schedulers fill it too
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        y.copy_(x[:, :3].argmax(1))
        graph.replay()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
