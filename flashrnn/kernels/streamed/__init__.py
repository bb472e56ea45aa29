"""Many sequences of heads whose R is read from global memory at each step."""

from flashrnn.kernels.streamed.plan import StreamedPlan, plan_forward

__all__ = ["StreamedPlan", "plan_forward"]
