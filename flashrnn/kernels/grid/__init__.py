"""Heads that groups of CTAs own, which all run at once and exchange values through the L2 cache."""

from flashrnn.kernels.grid.plan import GridPlan, plan_scan
from flashrnn.kernels.grid.wgmma_plan import GridWgmmaPlan
from flashrnn.kernels.grid.wgmma_plan import plan_forward as plan_wgmma_forward

__all__ = ["GridPlan", "GridWgmmaPlan", "plan_scan", "plan_wgmma_forward"]
