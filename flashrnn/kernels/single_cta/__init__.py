"""Heads of up to 128 units, each computed by one CTA, which waits for no other."""

from flashrnn.kernels.single_cta.plan import (
    LARGEST_HEAD,
    SingleCtaPlan,
    plan_scan,
    possible_plans,
)
from flashrnn.kernels.single_cta.recurrent_gradient import GradientPlan, plan_gradient

__all__ = [
    "LARGEST_HEAD",
    "GradientPlan",
    "SingleCtaPlan",
    "plan_gradient",
    "plan_scan",
    "possible_plans",
]
