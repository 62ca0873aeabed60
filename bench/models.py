"""Shapes of the weights of networks that people train."""

from __future__ import annotations

from collections.abc import Iterator


def resnet50_shapes() -> Iterator[tuple[int, ...]]:
    """Yield the shapes of ResNet-50's 161 parameters: 25.6 million weights."""

    def convolution(out: int, into: int, size: int) -> Iterator[tuple[int, ...]]:
        yield (out, into, size, size)
        yield from ((out,), (out,))  # its batch norm

    yield from convolution(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(width, channels, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, channels, 1)
            channels = 4 * width
    yield from ((1000, channels), (1000,))
