"""Flat-LoRA with nBAR on LoRA layers of our own: noise on the merged weights, the frozen ones are never written."""

import torch
from torch import Tensor, nn

import samkern


class LoRALinear(nn.Module):
    """``x (W + scaling B A)' + bias`` with a frozen W. Adapters are found by these names."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        frozen = nn.functional.linear(x, self.weight, self.bias)
        return frozen + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


def main() -> None:
    torch.manual_seed(0)
    trained_before = [nn.Linear(16, 64), nn.Linear(64, 3)]
    model = nn.Sequential(LoRALinear(trained_before[0]), nn.GELU(), LoRALinear(trained_before[1]))
    before = [layer.weight.clone() for layer in trained_before]
    x, y = torch.randn(256, 16), torch.randint(0, 3, (256,))

    opt = samkern.FlatLoRA(model, torch.optim.AdamW, lr=3e-3, sigma=0.05, total_steps=100)
    bar = samkern.BAR(opt, model, kind="nbar", total_steps=100)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for step in range(100):
        loss = opt.step(closure)
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}, kappa {bar.kappa:.2f}")
    same = all(torch.equal(layer.weight, w) for layer, w in zip(trained_before, before, strict=True))
    print(f"frozen weights bitwise unchanged: {same}")


if __name__ == "__main__":
    main()
