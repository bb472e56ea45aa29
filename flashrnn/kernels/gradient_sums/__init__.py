"""Completes the gradients of R and of the bias: adds the parts that earlier kernels wrote."""

from flashrnn.kernels.gradient_sums.plan import SumsPlan, plan_shares, plan_sums, program

__all__ = ["SumsPlan", "plan_shares", "plan_sums", "program"]
