"""The table's operations that a plain Triton expression does not give, on float32 values.

None overflows into NaN, and none loses its relative precision near zero. They use the GPU's own
approximations of 2ˣ and 1/x, each right to about two units in the last place, and flush numbers
below 1e-38 to zero.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)

# Whether Triton's interpreter runs kernels. Triton's own library shows it: it follows the value
# that TRITON_INTERPRET had at the first import.
INTERPRETED = not isinstance(tl.zeros, triton.JITFunction)

if INTERPRETED:
    # It knows no assembly.
    @triton.jit
    def exp2(x):
        """``2ˣ``."""
        return tl.exp2(x)

    @triton.jit
    def fmod(x, y):
        """The remainder of ``x / y``, with the sign of ``x``."""
        return x % y

    @triton.jit
    def _reciprocal(x):
        return 1.0 / x

else:
    from triton.language.extra import libdevice

    @triton.jit
    def fmod(x, y):
        """The remainder of ``x / y``, with the sign of ``x``."""
        return libdevice.fmod(tl.cast(x, tl.float32), tl.cast(y, tl.float32))

    @triton.jit
    def exp2(x):
        """``2ˣ``."""
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
    return exp2(x * _LOG2_E)


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
def log1p_up_to_1(x):
    """``log(1 + x)`` for ``x`` from 0 to 1, and a little beyond."""
    # The polynomial of pointwise.cuh.
    square = x * x
    series = -0.00330106635 * square + (0.0201304853 * x - 0.0575343296)
    series = series * square + (0.106683888 * x - 0.153488159)
    series = series * square + (0.196932629 * x - 0.24958165)
    series = series * square + (0.333304763 * x - 0.499999374)
    return series * square + x


@triton.jit
def expm1(x):
    """``eˣ − 1``."""
    # As log1p, with the roles of exp and log exchanged.
    u = tl.exp(x)
    corrected = (u - 1.0) * (x / tl.log(u))
    corrected = tl.where(u - 1.0 == -1.0, -1.0, corrected)
    return tl.where((u == 1.0) | (u == float("inf")), tl.where(u == 1.0, x, u), corrected)


@triton.jit
def sign(x):
    """1, 0 or −1; 0 for NaN."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def copysign(x, y):
    """``|x|``, negative where ``y`` or its zero is."""
    x, y = tl.broadcast(tl.cast(x, tl.float32), tl.cast(y, tl.float32))
    # Triton's -x is 0 - x, which is 0 of 0.
    return tl.abs(x) * tl.where(y.to(tl.int32, bitcast=True) < 0, -1.0, 1.0)


@triton.jit
def pow(x, y):
    """``xʸ``, as C's ``powf``."""
    # By way of float64: log2 of float32, times y, is right to too few digits after the point.
    x, y = tl.broadcast(tl.cast(x, tl.float64), tl.cast(y, tl.float64))
    size = tl.abs(x)
    power = tl.exp2(y * tl.log2(size))
    power = tl.where((y == 0) | (size == 1), 1.0, power)
    is_integer = tl.floor(y) == y
    is_odd = is_integer & (2 * tl.floor(0.5 * y) != y)
    power = tl.where((x < 0) & (size < float("inf")) & (is_integer == 0), float("nan"), power)
    power = tl.where((x == 1) | (y == y), power, float("nan"))
    is_negative = (x.to(tl.int64, bitcast=True) < 0) & is_odd
    return (power * tl.where(is_negative, -1.0, 1.0)).to(tl.float32)


@triton.jit
def atan(x):
    """The arctangent."""
    # By one of its addition theorems, of a z between -tan(pi / 8) and tan(pi / 8); there an odd
    # polynomial (Cephes) is exact to 2e-8.
    size = tl.abs(x)
    is_far, is_near = size > 2.414213562373095, size < 0.4142135623730950
    z = tl.where(is_far, -1.0 / size, tl.where(is_near, size, (size - 1.0) / (size + 1.0)))
    square = z * z
    series = (8.05374449538e-2 * square - 1.38776856032e-1) * square + 1.99777106478e-1
    series = z + z * square * (series * square - 3.33329491539e-1)
    first = tl.where(is_far, 1.5707963267948966, tl.where(is_near, 0.0, 0.7853981633974483))
    return copysign(first + series, x)


@triton.jit
def erfc(x):
    """``1 − erf(x)``, in its tail too."""
    # Chebyshev's (Numerical Recipes, erfcc), right to 1.2e-7 of it; float64 for e to the power
    # of -x squared.
    size = tl.abs(x).to(tl.float64)
    t = 1.0 / (1.0 + 0.5 * size)
    series = t * 0.17087277 - 0.82215223
    series = (series * t + 1.48851587) * t - 1.13520398
    series = (series * t + 0.27886807) * t - 0.18628806
    series = (series * t + 0.09678418) * t + 0.37409196
    series = (series * t + 1.00002368) * t - 1.26551223
    tail = (t * tl.exp(series - size * size)).to(tl.float32)
    return tl.where(x < 0, 2.0 - tail, tail)
