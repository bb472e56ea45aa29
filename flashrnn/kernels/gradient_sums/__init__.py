"""What completes the gradients of R and of the bias: sums of parts that kernels before it wrote."""

from flashrnn.kernels.gradient_sums.plan import SumsPlan, plan_sums, program

__all__ = ["SumsPlan", "plan_sums", "program"]
