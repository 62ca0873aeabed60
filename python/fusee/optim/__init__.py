"""The optimisers of fusee and the functions beneath them."""

from fusee.bounds.ramps import LinearRamp, SmoothRamp
from fusee.losses.perp_grad import PerpGrad, perp_grad_
from fusee.prox.latent_prox import LatentProx
from fusee.prox.prox_group_envelope_inplace import prox_group_envelope_
from fusee.prox.prox_host import ScopeReport
from fusee.prox.prox_optimizers import ProxAdamW, ProxSGD
from fusee.prox.sparsity_controller import SparsityController

__all__ = [
    "LatentProx",
    "LinearRamp",
    "PerpGrad",
    "ProxAdamW",
    "ProxSGD",
    "ScopeReport",
    "SmoothRamp",
    "SparsityController",
    "perp_grad_",
    "prox_group_envelope_",
]
