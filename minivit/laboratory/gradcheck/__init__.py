r"""Gradient checking for any pair of the layer protocol, the reader's own functions included.

For y = f(x_1, ..., x_n) and a fixed random cotangent dy of y's shape, let L = sum(dy * y). A correct backward
returns dL/dx_i = J_i^T dy. The same numbers are found from the forward alone, along a direction d (a random one of
length 1, or one entry after the other), by

    forward     (L(x + h d) - L(x)) / h                                          error O(h)   + rounding eps / h
    central     (L(x + h d) - L(x - h d)) / 2h                                   error O(h^2) + rounding eps / h
    five-point  (8 L(x + h d) - 8 L(x - h d) - L(x + 2h d) + L(x - 2h d)) / 12h  error O(h^4) + rounding eps / h
    complex     Im L(x + i h d) / h,  h = 1e-30                                  error O(h^2), no rounding to balance

A difference subtracts two nearly equal numbers: the smaller h, the fewer digits are left. The error is smallest where
truncation and rounding meet, at h of about eps^(1/2), eps^(1/3) and eps^(1/5), eps = 2.2e-16: the V of the error
curve. The complex step (Squire & Trapp 1998) subtracts nothing, so its h can be so small that no truncation is left;
it needs a forward that is analytic: of a complex x, abs, norm, var and conj give something else than their power
series. Whether it is shows along one random direction, where the complex step and central differences must agree.

The verdict on an analytic value a against a numerical one n is |a - n| <= atol + rtol max(|a|, |n|). Reported is

    error = |a - n| / (atol / rtol + max(|a|, |n|)),   a relative error that stays finite where the gradient is 0,

and ``error <= rtol`` is that verdict exactly. Where no value exceeds atol, any gradient as small would pass: such a
result is "too small to tell". Everything is float64: in float32 rounding alone makes errors of 1e-3.

The steps are meant for numbers of order 1. An entry beyond 100 moves by a step |x_i| / 100 times as long: x_i + h is
rounded to a multiple of eps |x_i|, and at 1e8 a step of 6e-6 would be wrong in its third digit, as would be y. That is
right for functions that vary over lengths like |x|. For the others, such as sin at 1e8, a difference says little at any
step, since x itself is known to eps |x| only: check these by the complex step, which has neither trouble.

When a check fails
    1.  Is it float64? In float32 rounding alone makes errors of 1e-3. A forward with an array of float32 in it, or a
        constant rounded to it, shows as "right to 7 digits".
    2.  The verdict is "on a kink" (ReLU at 0, equal numbers in a maximum): differences cannot tell there, and the
        backward may be right. Move x away and check again.
    3.  "too small to tell": all values are near 0, and a gradient that is missing would pass too. Give larger x, or a
        forward multiplied by a large number.
    4.  "not analytic", "different numbers for the same arguments": the forward is at fault, not the backward: abs or
        norm of complex numbers, fresh random numbers, something kept from the last call.
    5.  WRONG for all methods with the same numerical value: the backward is wrong. The diagnosis names what the pattern
        suggests: a factor (a mean for a sum, a sum for a mean), a sign, a transpose, a missing term, one axis.
    6.  WRONG by differences alone, and not by the complex step: the step is wrong for this function. Draw the error
        against the step (`minivit gradcheck NAME --depth`).
    7.  Still not clear? Make the problem as small as it goes (one image, two tokens, D = 2), check element by element,
        and work the worst element out with a pencil: the result gives x, and each dy with the derivative of its y.
        Then halve the function: check the backward of its last lines alone, then of the lines before.
"""

from minivit.laboratory.gradcheck.arguments import CannotTellError
from minivit.laboratory.gradcheck.check import Result, check, check_model, compare, on_device
from minivit.laboratory.gradcheck.curves import Curve, Knee, error_curve, knee
from minivit.laboratory.gradcheck.diagnosis import diagnose
from minivit.laboratory.gradcheck.methods import COTANGENT_STREAM, LARGE, METHODS, Method, numerical_derivative
from minivit.laboratory.gradcheck.second_order import hessian_error, hessian_vector_product, symmetry_error

__all__ = [
    "COTANGENT_STREAM", "LARGE", "METHODS", "CannotTellError", "Curve", "Knee", "Method", "Result", "check",
    "check_model", "compare", "diagnose", "error_curve", "hessian_error", "hessian_vector_product", "knee",
    "numerical_derivative", "on_device", "symmetry_error",
]  # fmt: skip
