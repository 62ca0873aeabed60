"""The modules of fusee, under the names that users of ``torch.nn`` look for."""

from fusee.bounds.certify import CertificationReport, certify
from fusee.bounds.interval_init import interval_init_
from fusee.bounds.interval_model import IntervalModel
from fusee.bounds.pgd_attack import pgd_attack
from fusee.bounds.propagate import IntervalOutput
from fusee.bounds.robust_cross_entropy import RobustCrossEntropyLoss
from fusee.losses.linear_stablemax_cross_entropy import LinearStableMaxCrossEntropyLoss
from fusee.losses.stablemax import LogStableMax, StableMax
from fusee.losses.stablemax_cross_entropy import StableMaxCrossEntropyLoss
from fusee.prox.cut import CutReport, LayerCut, cut_zero_groups
from fusee.prox.prunable import CoupledGroups, PrunableGroups, prunable_groups
from fusee.reparam.compand_model import compand_model, compander_param_groups, fold_companders
from fusee.reparam.compander import Compander
from fusee.reparam.weight_histograms import plot_weight_histograms
from fusee.reparam.weight_report import WeightReport, weight_report
from fusee.structured.monarch_linear import MonarchLinear
from fusee.structured.monarchize import MonarchReport, MonarchRow, densify, monarchize

__all__ = [
    "CertificationReport",
    "Compander",
    "CoupledGroups",
    "CutReport",
    "IntervalModel",
    "IntervalOutput",
    "LayerCut",
    "LinearStableMaxCrossEntropyLoss",
    "LogStableMax",
    "MonarchLinear",
    "MonarchReport",
    "MonarchRow",
    "PrunableGroups",
    "RobustCrossEntropyLoss",
    "StableMax",
    "StableMaxCrossEntropyLoss",
    "WeightReport",
    "certify",
    "compand_model",
    "compander_param_groups",
    "cut_zero_groups",
    "densify",
    "fold_companders",
    "interval_init_",
    "monarchize",
    "pgd_attack",
    "plot_weight_histograms",
    "prunable_groups",
    "weight_report",
]
