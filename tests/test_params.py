"""What a request may ask: everything else is a ValueError that names the field."""

import pytest

from jaxkv import SamplingParams


@pytest.mark.parametrize(("field", "value"), [
    ("stop", 5), ("stop", True), ("stop", 0), ("stop", [5]), ("stop_token_ids", 5), ("stop_token_ids", ["a"]),
    ("logit_bias", 5), ("logit_bias", [1]), ("logit_bias", [(1, 2, 3)]), ("logit_bias", {"a": 1}), ("logit_bias", {1: "a"}),
    ("temperature", 10**400), ("temperature", float("nan")), ("structured", 5), ("structured", {"type": "regex"}),
])
def test_a_value_of_no_use_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must "):
        SamplingParams(**{field: value})


def test_shapes_that_are_accepted():
    params = SamplingParams(stop="a", stop_token_ids=[5], logit_bias={5: 1})
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (5,), ((5, 1.0),))
    assert SamplingParams(stop=["a"], stop_token_ids=(5,), logit_bias=[(5, 1)]) == params
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()
