"""Fused kernels for methods that regularise, structure or certify a network, as a PyTorch extension.

The functions are here, the modules in :mod:`fusee.nn`, the optimisers in :mod:`fusee.optim`.
``python -m fusee`` shows what was built and which engine serves each device.
"""

from fusee import nn, optim
from fusee._library import LOADED as _LOADED
from fusee.losses.linear_stablemax_cross_entropy import linear_stablemax_cross_entropy
from fusee.losses.stablemax import log_stablemax, stablemax
from fusee.losses.stablemax_cross_entropy import stablemax_cross_entropy
from fusee.prox.group_envelope import group_envelope
from fusee.prox.group_table import GroupTable
from fusee.prox.projections import (
    project_top_k_ball,
    project_top_k_groups,
    project_top_k_nonnegative,
    project_top_k_simplex,
)
from fusee.prox.prox_group_envelope import prox_group_envelope
from fusee.reparam.compand import compand
from fusee.reparam.compand_foreach import compand_foreach
from fusee.reparam.compand_inverse import compand_inverse
from fusee.structured.block_diagonal_matmul import block_diagonal_matmul
from fusee.structured.monarch_matmul import monarch_matmul
from fusee.structured.monarch_project import monarch_project, monarch_to_dense
from fusee.transport.result import TransportResult
from fusee.transport.sinkhorn_newton import sinkhorn_newton, sinkhorn_newton_samples

__version__ = "0.1.0"
__all__ = [
    "GroupTable",
    "TransportResult",
    "block_diagonal_matmul",
    "compand",
    "compand_foreach",
    "compand_inverse",
    "engine",
    "group_envelope",
    "linear_stablemax_cross_entropy",
    "log_stablemax",
    "monarch_matmul",
    "monarch_project",
    "monarch_to_dense",
    "nn",
    "optim",
    "project_top_k_ball",
    "project_top_k_groups",
    "project_top_k_nonnegative",
    "project_top_k_simplex",
    "prox_group_envelope",
    "sinkhorn_newton",
    "sinkhorn_newton_samples",
    "stablemax",
    "stablemax_cross_entropy",
]


def engine(device: str = "cpu") -> str | None:
    """The engine that serves ``"cpu"`` or ``"cuda"`` in this process, None if none does."""
    return _LOADED[device].engine
