"""The table's operations that a plain Triton expression does not give, on float32 values.

None overflows into NaN, and none loses its relative precision near zero. What they rest on are the
GPU's own approximations of 2ˣ and 1/x, each right to about two units in the last place, without
the code around them that keeps numbers below 1e-38, which here may as well be zero.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)

# Whether Triton's interpreter runs kernels: as it runs Triton's own library, which follows what
# TRITON_INTERPRET said when it was first imported.
INTERPRETED = not isinstance(tl.zeros, triton.JITFunction)

if INTERPRETED:
    # It knows no assembly.
    @triton.jit
    def _exp2(x):
        return tl.exp2(x)

    @triton.jit
    def _reciprocal(x):
        return 1.0 / x

else:

    @triton.jit
    def _exp2(x):
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _reciprocal(x):
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp(x):
    """``eˣ``."""
    return _exp2(x * _LOG2_E)


@triton.jit
def sigmoid(x):
    """``1 / (1 + e⁻ˣ)``."""
    # exp may overflow to inf for x ≪ 0; 1 / inf is the right 0.
    return _reciprocal(1.0 + exp(-x))


@triton.jit
def tanh(x):
    """The hyperbolic tangent."""
    # (1 − e) / (1 + e) cancels where e is close to 1; there an odd polynomial, tanh's Taylor
    # series, is exact to 1e-8.
    square = x * x
    e = exp(-2.0 * tl.abs(x))
    ratio = (1.0 - e) * _reciprocal(1.0 + e)
    series = 62.0 / 2835.0 * square - 17.0 / 315.0
    series = (series * square + 2.0 / 15.0) * square - 1.0 / 3.0
    series = x + x * square * series
    return tl.where(square < 0.0625, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def log1p(x):
    """``log(1 + x)``."""
    # The rounding of 1 + x is divided out again (Kahan).
    u = 1.0 + x
    corrected = tl.log(u) * (x / (u - 1.0))
    return tl.where((u == 1.0) | (u == float("inf")), x, corrected)


@triton.jit
def expm1(x):
    """``eˣ − 1``."""
    # As log1p, with the roles of exp and log exchanged.
    u = tl.exp(x)
    corrected = (u - 1.0) * (x / tl.log(u))
    corrected = tl.where(u == 0.0, -1.0, corrected)
    return tl.where((u == 1.0) | (u == float("inf")), tl.where(u == 1.0, x, u), corrected)


@triton.jit
def sign(x):
    """1, 0 or −1; 0 for NaN."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
