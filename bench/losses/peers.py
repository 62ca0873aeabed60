"""What a user would write or pick instead of our losses, from the formulas alone.

With s(x) = x + 1 for x >= 0 and 1 / (1 - x) below, log s(x) = sign(x) log(1 + |x|), the "symlog"
map; so StableMax is the softmax of symlog, and its cross entropy the ordinary one on symlog logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-30  # as the reference: it protects the branch that `where` did not select


def positive_map(x: Tensor) -> Tensor:
    """s(x) by `where`, as the reference has it."""
    return torch.where(x < 0, 1 / (1 - x + EPSILON), x + 1)


def symlog(x: Tensor) -> Tensor:
    """log s(x) = sign(x) log1p(|x|)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def eager_float64(input: Tensor, target: Tensor) -> Tensor:
    """The form that HRM and TRM train with: float64, log of the ratio, gather, mean."""
    s = positive_map(input.to(torch.float64))
    log_probabilities = torch.log(s / s.sum(-1, keepdim=True))
    return -log_probabilities.gather(-1, target.unsqueeze(-1)).squeeze(-1).mean()


def symlog_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """The one-line form, in float32 whatever the dtype of the input."""
    return F.cross_entropy(symlog(input.float()), target)
