"""The modules of fusee, under the names that users of ``torch.nn`` look for."""

from fusee.losses.linear_stablemax_cross_entropy import LinearStableMaxCrossEntropyLoss
from fusee.losses.stablemax import LogStableMax, StableMax
from fusee.losses.stablemax_cross_entropy import StableMaxCrossEntropyLoss

__all__ = [
    "LinearStableMaxCrossEntropyLoss",
    "LogStableMax",
    "StableMax",
    "StableMaxCrossEntropyLoss",
]
