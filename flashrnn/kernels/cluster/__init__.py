"""Heads that clusters of CTAs compute, exchanging values from shared memory to shared memory."""

from flashrnn.kernels.cluster.backward_plan import ClusterBackwardPlan, plan_backward
from flashrnn.kernels.cluster.mma_plan import ClusterMmaPlan
from flashrnn.kernels.cluster.mma_plan import plan_forward as plan_mma_forward
from flashrnn.kernels.cluster.plan import ClusterPlan
from flashrnn.kernels.cluster.wgmma_backward_plan import ClusterWgmmaBackwardPlan
from flashrnn.kernels.cluster.wgmma_backward_plan import plan_backward as plan_wgmma_backward
from flashrnn.kernels.cluster.wgmma_plan import ClusterWgmmaPlan
from flashrnn.kernels.cluster.wgmma_plan import plan_forward as plan_wgmma_forward

__all__ = [
    "ClusterBackwardPlan",
    "ClusterMmaPlan",
    "ClusterPlan",
    "ClusterWgmmaBackwardPlan",
    "ClusterWgmmaPlan",
    "plan_backward",
    "plan_mma_forward",
    "plan_wgmma_backward",
    "plan_wgmma_forward",
]
