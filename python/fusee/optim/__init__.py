"""The optimisers of fusee and the functions beneath them."""

from fusee.losses.perp_grad import PerpGrad, perp_grad_

__all__ = ["PerpGrad", "perp_grad_"]
