"""Fused kernels for methods that regularise, structure or certify a network, as a PyTorch extension.

The functions are here, the modules in :mod:`fusee.nn`, the optimisers in :mod:`fusee.optim`.
``python -m fusee`` shows what was built and which engine serves each device.
"""

from fusee import nn, optim
from fusee._library import LOADED as _LOADED
from fusee.bounds.boxes import center_radius, lower_upper
from fusee.bounds.interval_affine import interval_relu
from fusee.bounds.interval_batch_norm import interval_batch_norm
from fusee.bounds.interval_conv2d import interval_conv2d
from fusee.bounds.interval_linear import interval_linear
from fusee.bounds.interval_margins import interval_margins
from fusee.bounds.interval_model import interval_bounds
from fusee.bounds.propagation_tightness import linear_tightness, propagation_tightness
from fusee.bounds.robust_cross_entropy import robust_cross_entropy
from fusee.bounds.small_boxes import small_boxes
from fusee.bounds.warmup_penalty import interval_warmup_penalty
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
    "center_radius",
    "compand",
    "compand_foreach",
    "compand_inverse",
    "engine",
    "group_envelope",
    "interval_batch_norm",
    "interval_bounds",
    "interval_conv2d",
    "interval_linear",
    "interval_margins",
    "interval_relu",
    "interval_warmup_penalty",
    "linear_stablemax_cross_entropy",
    "linear_tightness",
    "log_stablemax",
    "lower_upper",
    "monarch_matmul",
    "monarch_project",
    "monarch_to_dense",
    "nn",
    "optim",
    "project_top_k_ball",
    "project_top_k_groups",
    "project_top_k_nonnegative",
    "project_top_k_simplex",
    "propagation_tightness",
    "prox_group_envelope",
    "robust_cross_entropy",
    "sinkhorn_newton",
    "sinkhorn_newton_samples",
    "small_boxes",
    "stablemax",
    "stablemax_cross_entropy",
]


def engine(device: str = "cpu") -> str | None:
    """The engine that serves ``"cpu"`` or ``"cuda"`` in this process, None if none does."""
    return _LOADED[device].engine
