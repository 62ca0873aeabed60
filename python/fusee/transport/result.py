"""What a solver of transport returns: potentials, and all that follows from them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusee._op import is_readable
from fusee.transport.plans import factor, unit_of_mass
from fusee.transport.transport_plan import transport_plan, transport_plan_gradient

_ENTRIES_OF_BLOCK = 1 << 22


class TransportResult:
    """The solution of :func:`fusee.sinkhorn_newton`.

    Of a batch, everything has its dimension first, and ``result[i]`` is the result of one problem. It is
    a pytree of tensors. Where the costs were a NumPy array, so is everything here. What depends on the
    problem is differentiable in the costs or points and in the masses; the plan, the marginals and
    ``value_linear`` are computed anew whenever they are asked for, from the costs or points themselves,
    which are not copied: where a tensor was changed in place meanwhile that raises RuntimeError. A NumPy
    array must not be changed.
    """

    __slots__ = ("_metric", "_numpy", "_tensors", "_tol", "_versions")

    def __init__(
        self, tensors: dict[str, Tensor], metric: int, tol: float, numpy: bool = False
    ) -> None:
        self._tensors = tensors
        self._metric = metric
        self._tol = tol
        self._numpy = numpy
        self._versions: list[tuple[Tensor, int]] = []
        if not torch.compiler.is_compiling():
            given = [tensors[name] for name in ("x", "y") if name in tensors]
            known = [t for t in given if is_readable(t) and not t.is_inference()]
            self._versions = [(tensor, tensor._version) for tensor in known]

    @property
    def potentials(self) -> tuple[Any, Any]:
        """f (n) and g (m), in the dtype of the result; f also of points without mass. In the balanced
        problem the constant between them is such that their means over the masses are equal."""
        return self._give(self._tensors["f"]), self._give(self._tensors["g"])

    @property
    def plan(self) -> Any:
        """P (n, m) = a_i b_j exp((f_i + g_j - C_ij) / reg)."""
        return self._give(self._dense())

    @property
    def value(self) -> Any:
        """<C, P> + reg KL(P | a b^T), and of unbalanced problems the weighted divergences of the
        marginals: what was minimised."""
        return self._give(self._tensors["value"])

    @property
    def value_linear(self) -> Any:
        """<C, P>."""
        self._check_unchanged()
        x = self._tensors["x"]
        if self._metric == 0:
            costs = torch.where(x < math.inf, x, 0.0).double()
            return self._give((costs * self._dense()).sum((-2, -1)))
        # The costs are homogeneous in the points, so Euler's theorem has their sum.
        x, y = x.double(), self._tensors["y"].double()
        grad_x, grad_y, *_ = map(self._of_batch, self._sums(x, y))
        twice = (x * grad_x).sum((-2, -1)) + (y * grad_y).sum((-2, -1))
        return self._give(twice / (4 if self._metric in (1, 4) else 2))

    @property
    def marginals(self) -> tuple[Any, Any]:
        """The sums of the plan's rows (n) and columns (m)."""
        _, _, rows, columns = self._sums(self._tensors["x"], self._tensors.get("y"))
        rows, columns = self._of_batch(rows), self._of_batch(columns)
        return self._give(self._tensors["a"] * rows), self._give(self._tensors["b"] * columns)

    @property
    def marginal_error(self) -> Any:
        """How far both marginals are from what they should be, in L1: from a and b, or of an unbalanced
        side from a exp(-f / weight)."""
        return self._give(self._tensors["error"])

    @property
    def converged(self) -> Any:
        """Whether ``marginal_error`` is at most ``tol`` times the larger of both masses."""
        t = self._tensors
        return self._give(t["error"] <= self._tol * unit_of_mass(t["a"], t["b"]))

    @property
    def n_iter(self) -> Any:
        """The number of Sinkhorn iterations and Newton steps together."""
        return self._give(self._tensors["n_iter"])

    @property
    def stages(self) -> Any:
        """What each stage of annealing did (48, 7): reg, Sinkhorn iterations, Newton steps, iterations
        of conjugate gradients, kept entries, refused steps, marginal error; unused rows are zero."""
        return self._give(self._tensors["stages"])

    @property
    def sparse_plan(self) -> Any:
        """The plan of one problem as a CSR tensor (of NumPy arrays, SciPy's), without entries below
        ``tol`` of an even share of their row and of their column. It is made by blocks of rows, so
        memory grows with what is kept. Of DTensors it is a plain tensor, the same in every process."""
        self._check_unchanged()
        t = self._tensors
        if hasattr(t["f"], "full_tensor"):
            tensors: dict[str, Any] = t
            whole = {name: tensor.full_tensor() for name, tensor in tensors.items()}
            return TransportResult(whole, self._metric, self._tol).sparse_plan
        if t["f"].dim() != 1:
            raise ValueError("sparse_plan is of one problem: use result[i].sparse_plan")
        n, m = t["f"].shape[0], t["g"].shape[0]
        row_mass = t["a"] * factor(t["f"], t["penalty"][0])
        column_mass = t["b"] * factor(t["g"], t["penalty"][1])
        values, columns, counts = [], [], []
        step = max(1, _ENTRIES_OF_BLOCK // max(m, 1))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            block = self._plan_of_rows(rows)
            least = torch.minimum(row_mass[rows].unsqueeze(1) / m, column_mass / n) * self._tol
            kept = block.detach() > least.detach()
            values.append(block[kept])
            columns.append(kept.nonzero()[:, 1])
            counts.append(kept.sum(1))
        empty = t["n_iter"].new_zeros(1)
        starts = torch.cat([empty, *counts]).cumsum(0)
        entries = (
            starts,
            torch.cat([empty[:0], *columns]),
            torch.cat([t["x"].new_empty(0), *values]),
        )
        if self._numpy:
            from scipy.sparse import csr_array  # type: ignore[import-untyped]

            indptr, indices, data = (entry.detach().numpy() for entry in entries)
            return csr_array((data, indices, indptr), shape=(n, m))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(*entries, size=(n, m), check_invariants=False)

    def __len__(self) -> int:
        self._check_batch()
        return len(self._tensors["f"])

    def __getitem__(self, index: Any) -> TransportResult:
        self._check_batch()
        if isinstance(index, tuple) or index is None or index is Ellipsis:
            raise TypeError(f"a result is indexed by its problems alone, got {index!r}")
        self._check_unchanged()
        tensors = {name: tensor[index] for name, tensor in self._tensors.items()}
        return TransportResult(tensors, self._metric, self._tol, self._numpy)

    def __reduce__(self) -> Any:
        self._check_unchanged()
        return TransportResult, (self._tensors, self._metric, self._tol, self._numpy)

    def __repr__(self) -> str:
        shown = ("value", "marginal_error", "converged", "n_iter")
        return f"TransportResult({', '.join(f'{name}={getattr(self, name)}' for name in shown)})"

    def _check_batch(self) -> None:
        if self._tensors["f"].dim() == 1:
            raise TypeError("this is the result of one problem, not of a batch")

    def _check_unchanged(self) -> None:
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                "the costs or points were changed in place after they were solved for: solve again, or "
                "give a copy"
            )

    def _give(self, tensor: Tensor) -> Any:
        if tensor.is_floating_point():
            tensor = tensor.to(self._tensors["x"].dtype)
        return tensor.detach().numpy()[()] if self._numpy else tensor

    def _plan_of_rows(self, rows: slice) -> Tensor:
        t = self._tensors
        y = t.get("y")
        given = (t["x"][rows], y, t["a"][rows], t["b"], t["reg"], t["f"][rows], t["g"])
        x, y, *others = (None if value is None else value.unsqueeze(0) for value in given)
        return transport_plan(x, y, self._metric, *others).squeeze(0)

    def _flat(self, tensor: Tensor | None) -> Tensor | None:
        """With one dimension for the problems, which may be none or many."""
        if tensor is None:
            return None
        batch = self._tensors["f"].shape[:-1]
        return tensor.reshape(math.prod(batch), *tensor.shape[len(batch) :])

    def _of_batch(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(*self._tensors["f"].shape[:-1], *tensor.shape[1:])

    def _dense(self) -> Tensor:
        self._check_unchanged()
        t = self._tensors
        x, y, *others = (self._flat(t.get(k)) for k in ("x", "y", "a", "b", "reg", "f", "g"))
        return self._of_batch(transport_plan(x, y, self._metric, *others))

    def _sums(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients of 2 <C, P> in the points for a fixed plan, and the sums of P / a and P / b."""
        self._check_unchanged()
        t = self._tensors
        ones = torch.ones_like(t["f"]), torch.ones_like(t["g"])
        given = (x, y, t["a"], t["b"], t["reg"], t["f"], t["g"], *ones)
        flat_x, flat_y, *others = (self._flat(value) for value in given)
        return transport_plan_gradient(flat_x, flat_y, self._metric, *others)


def _flatten(result: TransportResult) -> tuple[list[Tensor], Any]:
    tensors = result._tensors
    context = (tuple(tensors), result._metric, result._tol, result._numpy)
    return list(tensors.values()), context


def _flatten_with_keys(result: TransportResult) -> tuple[list[Any], Any]:
    values, context = _flatten(result)
    keys = (pytree.GetAttrKey(name) for name in context[0])
    return list(zip(keys, values, strict=True)), context


def _unflatten(values: Any, context: Any) -> TransportResult:
    names, metric, tol, numpy = context
    return TransportResult(dict(zip(names, values, strict=True)), metric, tol, numpy)


pytree.register_pytree_node(
    TransportResult,
    _flatten,
    _unflatten,
    serialized_type_name="fusee.TransportResult",
    to_dumpable_context=list,
    from_dumpable_context=lambda context: (tuple(context[0]), *context[1:]),
    flatten_with_keys_fn=_flatten_with_keys,
)
