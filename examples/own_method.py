"""A method of your own from the passes: a climb along the difference of two gradients, which no class here has."""

import torch

from samkern import ops

torch.manual_seed(0)
w = [torch.randn(30, 20), torch.randn(20)]
target = [torch.zeros_like(x) for x in w]
momentum = [torch.zeros_like(x) for x in w]
saved = [torch.empty_like(x) for x in w]
difference = [torch.zeros_like(x) for x in w]
one = torch.ones((), dtype=torch.float64)


def gradient(w):
    return [x - t + 0.1 * x**3 for x, t in zip(w, target, strict=True)]


for step in range(20):
    g = gradient(w)
    ops.perturb(w, g, saved, rho=0.1)  # saved = w; w += rho g / norm(g), one pass and a norm
    g_s = gradient(w)
    ops.decompose(difference, g, g_s, k=one)  # g_s - g
    ops.update_sgd(w, g_s, momentum, saved=saved, cache=difference, coeff_a=one, coeff_b=one, lr=0.02, momentum=0.5)
    if step % 5 == 0:
        print(f"step {step}: norm of w {ops.norms(w)[0, -1].sqrt().item():.3f}")
