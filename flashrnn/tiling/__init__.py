"""Plans: how a kernel is tiled for a problem. Pure functions of the problem and the device."""

from flashrnn.tiling.cluster import ClusterPlan, plan_cluster
from flashrnn.tiling.gpu import GPU
from flashrnn.tiling.gradient import GradientPlan, plan_gradient
from flashrnn.tiling.head import LARGEST_HEAD_OF_A_BLOCK, HeadPlan, plan_head
from flashrnn.tiling.scan import LARGEST_SCANNED_HEAD, ScanPlan, plan_scan
from flashrnn.tiling.team import TeamPlan, plan_team
from flashrnn.tiling.wide import WidePlan, plan_wide
from flashrnn.tiling.wide_cluster import WideClusterPlan, plan_wide_cluster

__all__ = [
    "GPU",
    "LARGEST_HEAD_OF_A_BLOCK",
    "LARGEST_SCANNED_HEAD",
    "ClusterPlan",
    "GradientPlan",
    "HeadPlan",
    "ScanPlan",
    "TeamPlan",
    "WideClusterPlan",
    "WidePlan",
    "plan_cluster",
    "plan_gradient",
    "plan_head",
    "plan_scan",
    "plan_team",
    "plan_wide",
    "plan_wide_cluster",
]
