"""Entropic optimal transport to machine precision, by Newton's method on annealed problems."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusee._checks import check_same_device, require_values
from fusee._op import is_readable
from fusee.transport.arguments import (
    as_batch,
    as_first,
    as_masses,
    as_penalty,
    as_reg,
    as_tensor,
    beside,
    check_max_iter,
    check_number,
    mass_tolerance,
    raise_for_values,
    scaled_to,
)
from fusee.transport.plans import METRICS, unit_of_mass
from fusee.transport.result import TransportResult
from fusee.transport.solver import solver


def sinkhorn_newton(
    M: Any,
    a: Any = None,
    b: Any = None,
    *,
    reg: float | Tensor,
    unbalanced: float | tuple[float, float] | None = None,
    tol: float = 1e-9,
    max_iter: int = 2000,
    potentials_init: tuple[Any, Any] | None = None,
) -> TransportResult:
    r"""Entropic optimal transport between masses ``a`` and ``b`` at costs ``M``, as POT's ``ot.solve``.

    .. math:: \min_P \langle M, P \rangle + \varepsilon\, \mathrm{KL}(P \mid a b^\top)
              \quad\text{with}\quad P 1 = a,\; P^\top 1 = b

    where :math:`\varepsilon` is ``reg`` and KL(p|q) = Σ p log(p/q) − p + q. The plan is
    :math:`P_{ij} = a_i b_j \exp((f_i + g_j - M_{ij}) / \varepsilon)`. With ``unbalanced`` the
    constraints become terms :math:`\rho_1 \mathrm{KL}(P 1 | a) + \rho_2 \mathrm{KL}(P^\top 1 | b)`.
    The regularisation is halved from that of an easy problem down to ``reg``; at each, steps of
    Sinkhorn's iteration come first, then Newton's with the plan's large entries, as many as the error
    asks for.

    Args:
        M: costs (n, m), or (B, n, m) for a batch; a tensor, a NumPy array, or anything that speaks
            DLPack; any strides; float32, float64, bfloat16 or float16. Entries may be negative, or +inf
            for a forbidden pair. Arithmetic is in float64 whatever its dtype.
        a: masses (n) or (B, n) of the rows, not negative, of any sum; by default uniform of sum one.
        b: masses (m) or (B, m) of the columns. In the balanced problem it is scaled to the sum of ``a``,
            from which it may differ by 1e-5, or by a half type's rounding, relatively.
        reg: the weight of the entropy, above zero, in the unit of the costs: a number, or a tensor (B).
        unbalanced: the weight of both marginals' divergences, or a pair of weights; infinite where a
            marginal holds. None for the balanced problem.
        tol: the L1 error of both marginals together, over the larger of both masses, at which a problem
            is solved.
        max_iter: the most Sinkhorn iterations and Newton steps together, of each problem. A problem
            whose error is not halved any more, because rounding is in the way or there is no solution,
            ends before.
        potentials_init: potentials (f, g) to begin with, such as those of a similar problem. f is not
            used: it follows from g.

    Returns:
        A :class:`fusee.TransportResult`, with ``plan``, ``sparse_plan``, ``potentials``, ``value``,
        ``value_linear``, ``marginals``, ``marginal_error``, ``converged``, ``n_iter`` and ``stages``;
        float64 for float64 costs, float32 for all others; NumPy arrays where M is one.

    Raises:
        TypeError: a tensor or number of the wrong type.
        ValueError: shapes that do not fit, arrays on different devices, numbers that are not positive,
            ``reg`` that requires grad. And what only values show: negative or infinite masses, NaN
            among masses or costs, -inf among costs, unequal masses in the balanced problem, a point with
            mass and forbidden pairs only. In compiled code, under ``torch.func``, on CUDA and of
            DTensors problems with such a value are NaN instead; with ``FUSEE_CHECK_VALUES=1`` in the
            environment they raise in compiled code and on CUDA.

    In eager mode a RuntimeWarning says how many problems did not reach ``tol``, ``converged`` which.
    The value is differentiable to second order (in reverse mode, or forward over it), potentials and
    plans to first order, in ``M``, ``a`` and ``b``, in reverse and forward mode; their derivatives are
    those of the exact solution, through one linear system. Between parts of a plan that exchange less
    than 1e-12 of the mass, as where ``reg`` is so small that it is a matching, float64 does not
    determine the potentials, nor their derivatives; value and plan it does. Potentials of points without
    mass have no derivative: a gradient from them is NaN.
    Deterministic: the same bits on the same engine, whatever the number of threads; every problem of a
    batch is solved as if alone. A DTensor ``M`` whose batch is split keeps its sharding, without
    communication; other shardings are gathered. Plain tensors beside it must be the same in every
    process, and there is no warning.

    Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao and Ying, "Accelerating Sinkhorn
    Algorithm with Sparse Newton Iterations", arXiv:2401.12253; here annealed, on the semi-dual, with an
    error that decides what is kept.

    Example:
        >>> import torch, fusee
        >>> M = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
        >>> result = fusee.sinkhorn_newton(M, reg=0.5)
        >>> result.plan
        tensor([[0.3178, 0.0155],
                [0.0911, 0.2423],
                [0.0911, 0.2423]])
        >>> bool(result.converged)
        True
    """
    x = as_batch("M", M, "(n, m)")
    masses = {"a": a, "b": b}
    return _solve(
        {"M": x},
        isinstance(M, np.ndarray),
        0,
        masses,
        reg,
        unbalanced,
        tol,
        max_iter,
        potentials_init,
    )


def sinkhorn_newton_samples(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    *,
    metric: str = "sqeuclidean",
    reg: float | Tensor,
    unbalanced: float | tuple[float, float] | None = None,
    tol: float = 1e-9,
    max_iter: int = 2000,
    potentials_init: tuple[Any, Any] | None = None,
) -> TransportResult:
    r"""Entropic optimal transport between points, as POT's ``ot.solve_sample``: the problem of
    :func:`fusee.sinkhorn_newton` with costs that are computed where they are needed. Memory grows with
    n + m and with the plan's entries that count; on CUDA there are also four bits for each pair.

    .. math:: \min_P \sum_{ij} P_{ij}\, c(x_i, y_j) + \varepsilon\, \mathrm{KL}(P \mid a b^\top)
              \quad\text{with}\quad P 1 = a,\; P^\top 1 = b

    Args:
        X_a: points x (n, d), or (B, n, d) for a batch, as ``M`` in :func:`fusee.sinkhorn_newton`.
        X_b: points y (m, d) or (B, m, d).
        a: masses (n) or (B, n) of ``X_a``, by default uniform of sum one.
        b: masses (m) or (B, m) of ``X_b``, of the same sum in the balanced problem.
        metric: the cost c of two points: ``"sqeuclidean"`` \|x − y\|², ``"euclidean"`` \|x − y\|,
            ``"cityblock"`` Σ \|x_k − y_k\|, or ``"dot"`` −⟨x, y⟩.
        reg: the weight of the entropy, above zero: a number, or a tensor (B).
        unbalanced: the weight of both marginals' divergences, or a pair of weights; None for the
            balanced problem.
        tol: the L1 error of both marginals together, over the larger of both masses, at which a problem
            is solved.
        max_iter: the most Sinkhorn iterations and Newton steps together, of each problem.
        potentials_init: potentials (f, g) to begin with.

    Returns:
        A :class:`fusee.TransportResult`, as :func:`fusee.sinkhorn_newton`. Its ``plan`` alone takes
        memory for n times m.

    Raises:
        TypeError: a tensor or number of the wrong type.
        ValueError: what raises in :func:`fusee.sinkhorn_newton`, an unknown metric, points that are not
            finite.

    Differentiable as :func:`fusee.sinkhorn_newton` is, in ``X_a``, ``X_b``, ``a`` and ``b``; between
    points, or coordinates, that coincide ``"euclidean"`` and ``"cityblock"`` have derivative zero.
    Second order and forward mode take memory for n times m. Deterministic: the same bits on the same
    engine, whatever the number of threads.

    Source: as :func:`fusee.sinkhorn_newton`.

    Example:
        >>> import torch, fusee
        >>> X_a, X_b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5], [2.0]])
        >>> fusee.sinkhorn_newton_samples(X_a, X_b, reg=0.01).value_linear
        tensor(0.6250)
    """
    x = as_batch("X_a", X_a, "(n, d)")
    y = as_batch("X_b", X_b, "(m, d)")
    check_same_device("X_b", y, "X_a", x)
    if y.dim() != x.dim() or y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"X_b must have the batch and the dimension of X_a {tuple(x.shape)}, got {tuple(y.shape)}"
        )
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    points = {"X_a": x.to(dtype), "X_b": beside(x, y).to(dtype)}
    numpy = isinstance(X_a, np.ndarray)
    number = 1 + METRICS.index(metric)
    masses = {"a": a, "b": b}
    return _solve(points, numpy, number, masses, reg, unbalanced, tol, max_iter, potentials_init)


def _solve(
    given: dict[str, Tensor],
    numpy: bool,
    metric: int,
    masses: dict[str, Any],
    reg: Any,
    unbalanced: Any,
    tol: Any,
    max_iter: Any,
    potentials_init: Any,
) -> TransportResult:
    """Costs, or points of both sides, by name; arguments that are not checked yet."""
    (x_name, x), *others = given.items()
    y = others[0][1] if others else None
    n, m = x.shape[-2], x.shape[-1] if y is None else y.shape[-2]
    a, b = (None if value is None else as_tensor(name, value) for name, value in masses.items())
    of_a, of_b = as_masses("a", a, n, x_name, x), as_masses("b", b, m, x_name, x)
    weight = as_reg(reg, x_name, x)
    penalty, balanced = as_penalty(unbalanced, x)
    tol = check_number("tol", tol)
    max_iter = check_max_iter(max_iter)
    first = as_first(potentials_init, n, m, x_name, x)
    tolerance = mass_tolerance(a, b)
    scaled = scaled_to(of_a, of_b, tolerance) if balanced else of_b

    batched = x.dim() == 3
    args = [x, y] if batched else [x[None], None if y is None else y[None]]
    # The error of what is returned is computed anew, and may be larger by its rounding.
    goal = 0.9 * tol
    outputs = solver(*args, metric, of_a, scaled, weight, penalty, first, goal, max_iter)
    value, f, g, error, n_iter, stages = outputs

    def explain() -> None:
        both = {"a": of_a, "b": of_b}
        raise_for_values(given, both, weight, first, tolerance, balanced=balanced)

    require_values(x, lambda: error.isnan().any(), explain)
    if not torch.compiler.is_compiling() and is_readable(error) and not error.is_meta:
        _warn_unless_converged(error, tol, unit_of_mass(of_a, scaled), n_iter)
    tensors = {"a": of_a, "b": scaled, "reg": weight, "penalty": penalty, "f": f, "g": g}
    tensors |= {"value": value, "error": error, "n_iter": n_iter, "stages": stages}
    if not batched:
        tensors = {name: tensor[0] for name, tensor in tensors.items()}
    points = {"x": x} if y is None else {"x": x, "y": y}
    return TransportResult(points | tensors, metric, tol, numpy)


def _warn_unless_converged(error: Tensor, tol: float, mass: Tensor, n_iter: Tensor) -> None:
    left = error > tol * mass
    count = int(left.sum())
    if count > 0:
        warnings.warn(
            f"sinkhorn_newton: {count} of {len(error)} problems did not converge: marginal error up to "
            f"{float(error[left].max()):.3g} after up to {int(n_iter[left].max())} iterations, above "
            f"tol={tol:.3g} of the mass",
            RuntimeWarning,
            stacklevel=4,
        )
