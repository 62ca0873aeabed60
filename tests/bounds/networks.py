"""Networks that the tests bound."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fully_connected(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i, (k, n) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(k, n)] + ([nn.ReLU()] if i < len(widths) - 2 else [])
    return nn.Sequential(*layers)


def convolutional() -> nn.Sequential:
    """Convolutions of every kind of option, pooling, and a linear layer."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(2, 6, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(6),
            relu=nn.ReLU(),
            second=nn.Conv2d(6, 6, 3, stride=2, padding=1, dilation=1, groups=2),
            leaky=nn.LeakyReLU(),
            pool=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            last=nn.Linear(24, 5),
        )
    )


class Residual(nn.Module):
    """Two blocks with sums, concatenation, functions and a view of a size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(32, 5)
        self.register_buffer("mean", torch.tensor([0.4, 0.6]).view(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.5
        x = F.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.inner(x))
        x = torch.cat([F.max_pool2d(x, 4), F.adaptive_avg_pool2d(self.other(x), 2)], 1)
        x = x.view(x.size(0), -1)
        return self.last(torch.tanh(x))


def settled(model: nn.Module, *shape: int) -> nn.Module:
    """The network in evaluation, with running statistics of some batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(16, *shape) + 0.5)
    return model.eval()


def three_networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """A network of each kind, and the shape of its input."""
    torch.manual_seed(3)
    images = (2, 8, 8)
    return {
        "fully connected": (fully_connected(20, 32, 32, 4), (20,)),
        "convolutional": (settled(convolutional(), *images), images),
        "residual": (settled(Residual(), *images), images),
    }
