"""Derivatives: numerical checks of every order and mode, and autograd's own ways of use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from tests.harness.helpers import chosen, cotangent, naming, value_and_grad
from tests.harness.measure import same_bits, ulps
from tests.harness.spec import OpSpec, Sample, as_function, detached


def _leaves(spec: OpSpec, sample: Sample) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The call as a function of its differentiable arguments, and those as leaves."""
    names = spec.has_gradient(sample.arguments)
    leaves = detached(sample.arguments, names)
    return as_function(spec.function, leaves, names), [leaves[name] for name in names]


def _smooth(spec: OpSpec, device: str) -> list[Sample]:
    return chosen(spec, torch.float64, device, tiny=True, smooth=True)


def test_gradcheck(spec: OpSpec, device: str) -> None:
    """First order in reverse and forward mode, and both batched, against finite differences."""
    for sample in _smooth(spec, device):
        function, leaves = _leaves(spec, sample)
        with naming(sample.name):
            assert gradcheck(
                function,
                leaves,
                check_forward_ad=True,
                check_batched_grad=True,
                check_batched_forward_grad=False,
            )


@pytest.mark.rules
def test_gradgradcheck(spec: OpSpec, device: str) -> None:
    """Second order, in reverse over reverse and forward over reverse."""
    for sample in _smooth(spec, device):
        function, leaves = _leaves(spec, sample)
        with naming(sample.name):
            assert gradgradcheck(function, leaves, check_fwd_over_rev=True)


def _nth_gradient(
    function: Callable[..., Tensor], leaves: list[Tensor], order: int
) -> list[Tensor]:
    """The gradients of the sum of squared gradients, of the given order."""
    value = function(*leaves).square().sum()
    for _ in range(order - 1):
        grads = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        value = torch.stack([grad.square().sum() for grad in grads]).sum()
    return list(torch.autograd.grad(value, leaves, materialize_grads=True))


@pytest.mark.rules
def test_third_order(spec: OpSpec, device: str) -> None:
    """The third order is right too."""
    for sample in _smooth(spec, device):
        function, leaves = _leaves(spec, sample)
        if leaves[0].numel() == 0:
            continue
        names = spec.has_gradient(sample.arguments)
        oracle = as_function(spec.oracle, detached(sample.arguments), names)
        with naming(sample.name):
            actual = _nth_gradient(function, leaves, 3)
            expected = _nth_gradient(oracle, leaves, 3)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_retain_graph(spec: OpSpec, device: str) -> None:
    """One graph can be used again, and gives the same bits."""
    for sample in chosen(spec, torch.float32, device, tiny=True):
        function, leaves = _leaves(spec, sample)
        output = function(*leaves)
        grad = cotangent(output)
        first = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        again = torch.autograd.grad(output, leaves, grad)
        with naming(sample.name):
            assert all(map(same_bits, first, again))


def test_checkpoint(spec: OpSpec, device: str) -> None:
    """Activation checkpointing gives the same bits, with either implementation."""
    for sample in chosen(spec, torch.float32, device, tiny=True):
        names = spec.has_gradient(sample.arguments)
        _, expected = value_and_grad(spec.function, sample.arguments, names)
        for reentrant in (True, False):
            function, leaves = _leaves(spec, sample)
            with naming(f"{sample.name}, {reentrant=}"):
                output = checkpoint(function, *leaves, use_reentrant=reentrant)
                output.backward(cotangent(output))
                for name, leaf in zip(names, leaves, strict=True):
                    assert same_bits(leaf.grad, expected[name])


def test_no_grad(spec: OpSpec, device: str) -> None:
    """Without gradients nothing is recorded, and the result has the same bits."""
    for sample in chosen(spec, torch.float32, device, tiny=True):
        function, leaves = _leaves(spec, sample)
        recorded = function(*leaves)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                plain = function(*leaves)
            assert not plain.requires_grad
            assert same_bits(plain, recorded)


def test_each_gradient_alone(spec: OpSpec, device: str) -> None:
    """Each gradient is the same whether the others are asked for or not."""
    for sample in chosen(spec, torch.float32, device, tiny=True):
        names = spec.has_gradient(sample.arguments)
        _, together = value_and_grad(spec.function, sample.arguments, names)
        for name in names:
            _, alone = value_and_grad(spec.function, sample.arguments, [name])
            with naming(f"{sample.name}: {name}"):
                assert ulps(alone[name], together[name]) <= 2
