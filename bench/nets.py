"""The network of the training study: ResNet-18 as it is used on CIFAR, 11,173,962 parameters in 62 tensors at width 64."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def convolution(n_in: int, n_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the image's size (but for ``stride``), and its BatchNorm."""
    return [nn.Conv2d(n_in, n_out, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(n_out)]


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *convolution(n_in, n_out, 3, stride), nn.ReLU(inplace=True), *convolution(n_out, n_out, 3)
        )
        same = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(n_in, n_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.main(x) + self.shortcut(x))


def resnet18(width: int = 64, n_classes: int = 10) -> nn.Sequential:
    """3x3 stem without pooling, four stages of two blocks with ``width`` to ``8 * width`` channels, linear classifier.

    He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2 for the stem.
    """
    layers = [*convolution(3, width, 3), nn.ReLU(inplace=True)]
    n_in = width
    for stage in range(4):
        n_out = width << stage
        layers += [Block(n_in, n_out, stride=1 if stage == 0 else 2), Block(n_out, n_out, stride=1)]
        n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes))
