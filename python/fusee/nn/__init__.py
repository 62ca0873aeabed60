"""The modules of fusee, under the names that users of ``torch.nn`` look for."""

from fusee.losses.stablemax import LogStableMax, StableMax
from fusee.losses.stablemax_cross_entropy import StableMaxCrossEntropyLoss

__all__ = ["LogStableMax", "StableMax", "StableMaxCrossEntropyLoss"]
