"""What the comparison of finite, infinite and NaN elements lets pass, and what it finds."""

import math

import pytest
import torch

from tests import fused
from tests.patterns import linear
from tests.problems import Inputs, call, random_inputs


@pytest.fixture
def rounding_once(monkeypatch):
    """A backend "cuda" that is vanilla in float32, of which all is rounded once; and faults.

    A fault changes what it is named after, R's gradient or the states, in place.
    """
    faults = {}

    def changed(name):
        def change(x):
            x = x.clone()
            faults.get(name, lambda _: None)(x)
            return x

        return change

    def call_or_stand_in(kind, inputs, backend, **options):
        if backend != "cuda":
            return call(kind, inputs, backend=backend, **options)
        wide = Inputs(**{name: x.float() for name, x in inputs.tensors().items()})
        wide.R.register_hook(changed("d_R"))
        states, last_states = call(kind, wide, backend="vanilla", **options)
        return changed("states")(states.to(inputs.Wx.dtype)), last_states

    monkeypatch.setattr(fused, "call", call_or_stand_in)
    return faults


def cancelling():
    """A call whose first gate has at step 0 the gradient 2⁻¹² of 1 + 2⁻¹² − 1, in float16 0.

    It meets an infinite h.
    """
    inputs = random_inputs(linear, 1, 2, 1, 2, torch.float16)
    with torch.no_grad():
        for x in inputs.tensors().values():
            x.zero_()
        inputs.R.fill_(1)
        inputs.states[..., 0] = math.inf
    d_states = torch.tensor([[-1, 0], [1, 2**-12]], dtype=torch.float16)
    return inputs, (d_states.view(1, 1, 2, 1, 2), torch.zeros(1, 1, 1, 1, 2))


def test_an_infinity_that_float64_has_is_right_where_vanilla_rounds_to_0(rounding_once):
    inputs, asked = cancelling()
    states, last_states = call(linear, inputs, backend="vanilla")
    (d_R,) = torch.autograd.grad((states, last_states), [inputs.R], asked)
    assert d_R[0, 0, 0, 0].isnan() and d_R.isnan().sum() == 1
    fused.same_pattern_as_vanilla("cuda", linear, inputs, asked)


@pytest.mark.parametrize(
    ("name", "place", "value", "complaint"),
    [
        ("d_R", (0, 0, 0, 0), -math.inf, r"d_R\[0, 0, 0, 0\] is -inf, of vanilla nan, and 0 more"),
        ("d_R", (0, 0, 0, 0), 1.0, r"d_R\[0, 0, 0, 0\] is 1.0, of vanilla nan"),
        ("d_R", (0, 0, 0, 1), math.nan, r"d_R\[0, 0, 0, 1\] is nan, of vanilla inf"),
        ("d_R", (0, 0, 1, 1), -math.inf, r"d_R\[0, 0, 1, 1\] is -inf, of vanilla inf"),
        ("d_R", (0, 0, 1, 1), 0.0, r"d_R\[0, 0, 1, 1\] is 0.0, of vanilla inf"),
        ("states", (0, 0, 1, 0, 1), 1.0, r"states\[0, 0, 1, 0, 1\] is 1.0, of vanilla inf"),
    ],
)
def test_any_other_pattern_is_wrong(rounding_once, name, place, value, complaint):
    def fault(x):
        x[place] = value

    rounding_once[name] = fault
    with pytest.raises(AssertionError, match=complaint):
        fused.same_pattern_as_vanilla("cuda", linear, *cancelling())


@pytest.mark.parametrize("clipval", [None, 0.5])
def test_a_number_that_16_bits_do_not_hold_is_infinite_though_float64_has_it(
    rounding_once, clipval
):
    inputs, (d_states, d_last) = cancelling()
    with torch.no_grad():
        inputs.states.zero_()
        inputs.Wx.fill_(60000)
        inputs.R.fill_(0.5)
    options = {} if clipval is None else {"gradient_recurrent_clipval": clipval}
    asked = torch.full_like(d_states, 2.0), d_last

    def saturate(x):
        x.clamp_(-60000, 60000)

    fused.same_pattern_as_vanilla("cuda", linear, inputs, asked, **options)
    rounding_once["d_R"] = saturate
    with pytest.raises(AssertionError, match=r"d_R\[0, 0, 0, 0\] is .*, of vanilla inf"):
        fused.same_pattern_as_vanilla("cuda", linear, inputs, asked, **options)
