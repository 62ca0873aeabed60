"""Small networks of every kind whose channels are cut, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions beside a connection, which is a convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.down = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class Dense(nn.Module):
    """A layer of a DenseNet: normalisation first, its output beside its input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class Attention(nn.Module):
    """Attention by linear layers, of queries, keys and values together or apart."""

    def __init__(self, channels: int, heads: int, together: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (channels // heads) ** -0.5
        self.together = together
        if together:
            self.qkv = nn.Linear(channels, 3 * channels)
        else:
            self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.together:
            qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q * self.scale) @ k.transpose(-2, -1)
            mixed = scores.softmax(-1) @ v
        else:
            q, k, v = (
                layer(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class Transformer(nn.Module):
    """One block of a vision transformer, with a class at the end."""

    def __init__(self, together: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 12)
        self.position = nn.Parameter(0.1 * torch.randn(1, 5, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attn = Attention(12, 4, together)
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class Partly(nn.Module):
    """Two branches side by side, added to a third, whose channels go with one or with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.c, self.end = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(F.silu(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)))


class Twice(nn.Module):
    """A layer that is used twice, on its own output, and a normalisation used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.same, self.end = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.start(x)))
        return self.end(F.relu(self.bn(self.same(F.relu(self.same(x))))))


class Words(nn.Module):
    """An embedding whose channels a linear layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.end = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.end(F.relu(self.fc(self.embed(words).mean(1))))


class Network(NamedTuple):
    """A network, inputs for it, and the sets of layers that have their channels in common."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    sets: dict[tuple[str, ...], int]
    """How many groups each has."""
    heads: dict[str, str] = {}  # noqa: RUF012


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, width in ((3, 8), (8, 12), (12, 12)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 4)
    )


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8, 8, 1),
        Residual(8, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.Hardswish(), nn.Conv2d(12, 4, 1),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=2),
        nn.PReLU(8),
        nn.Conv2d(8, 4, 1),
    )


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), Dense(6, 4), Dense(10, 4), nn.BatchNorm2d(14), nn.ReLU(),
        nn.Conv2d(14, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def upward() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU(),
        nn.ConvTranspose2d(8, 6, 2, 2), nn.Dropout(), nn.ELU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.SiLU(), nn.Linear(7, 3)
    )


def encoder() -> nn.Module:
    """PyTorch's own block; its attention stays, its perceptron is cut."""
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))


QKV = {"attn.qkv": "attn.num_heads"}
APART = {f"attn.{part}": "attn.num_heads" for part in "qkv"}

NETWORKS: dict[str, Network] = {
    "vgg": Network(vgg, images, {("0",): 8, ("3",): 12, ("6",): 12, ("11",): 10}),
    "resnet": Network(
        resnet,
        images,
        {("0", "3.conv2"): 8, ("3.conv1",): 8, ("4.conv1",): 12, ("4.conv2", "4.down.0"): 12},
    ),
    "mobile": Network(mobile, images, {("0", "3"): 8, ("6",): 12}),
    "grouped": Network(grouped, images, {("0",): 6, ("2",): 4}),
    "dense": Network(dense, images, {("0", "1.conv", "2.conv"): 14, ("5",): 8}),
    "upward": Network(upward, images, {("0",): 8, ("3",): 6}),
    "perceptron": Network(perceptron, lambda: torch.randn(4, 5), {("0",): 9, ("2",): 7}),
    "together": Network(
        Transformer, lambda: torch.randn(2, 5, 7), {("attn.qkv",): 4, ("fc1",): 20}, QKV
    ),
    "apart": Network(
        lambda: Transformer(together=False),
        lambda: torch.randn(2, 5, 7),
        {("attn.q", "attn.k", "attn.v"): 4, ("fc1",): 20},
        APART,
    ),
    "encoder": Network(encoder, lambda: torch.randn(2, 5, 8), {("0.linear1",): 16}),
    "partly": Network(Partly, images, {("a", "b", "c"): 10}),
    "twice": Network(Twice, lambda: torch.randn(6, 5), {("start", "same"): 8}),
    "words": Network(Words, lambda: torch.randint(11, (3, 4)), {("embed",): 8, ("fc",): 6}),
}
