"""Pairs and parts put together: whose parameters, whose gradients, what is said of them."""

import numpy as np
import pytest

from minivit.base.pairs import Pair, add_gradients, as_part, chain, chain_parts

X = np.array([1.0, 2.0])


def scaled(name, **about):
    """y = w x, as a Pair with one parameter."""

    def forward(x, w, power=1):
        return w**power * x, (x, w)

    def backward(dy, cache):
        x, w = cache
        return w * dy, (x * dy).sum()

    return Pair(forward, backward, (name,), about)


SILENT = Pair(lambda x: (-x, None), lambda dy, cache: -dy)


def test_a_chain_is_one_pair_after_another():
    pair = chain(scaled("a", first="yes", both="first"), scaled("b", both="second"), "b")
    assert pair.names == ("a", "b") and pair.about == {"first": "yes", "both": "second"}
    y, cache = pair.forward(X, 3.0, 5.0)
    assert y.tolist() == [15.0, 30.0] and cache.name == "b"
    dx, da, db = pair.backward(np.ones(2), cache)
    assert dx.tolist() == [15.0, 15.0] and (da, db) == (15.0, 9.0)


def test_settings_go_to_the_first_of_a_chain():
    assert chain(scaled("a"), scaled("b"), "b").forward(X, 3.0, 5.0, power=2)[0].tolist() == [45.0, 90.0]


def test_a_pair_that_says_nothing_is_called_unknown_by_the_name_it_has_in_the_chain():
    pair = chain(scaled("a", first="yes"), SILENT, "silent")
    assert pair.about == {"first": "yes", "silent": "unknown"} and pair.names == ("a",)
    both = chain(SILENT, SILENT, "again")
    y, cache = both.forward(X)
    assert y.tolist() == X.tolist() and both.backward(X, cache).tolist() == X.tolist()  # dx alone, no tuple


def test_parts_one_after_the_other():
    part = chain_parts(as_part(scaled("a")), as_part(scaled("b")), second_name="scale")
    assert part.names == ("a", "b")
    y, cache = part.forward(X, {"a": 3.0, "b": 5.0, "c": None})
    assert y.tolist() == [15.0, 30.0] and (cache.first_name, cache.second_name) == ("", "scale")
    grads = {"a": np.zeros(()), "b": np.ones(())}
    assert part.backward(np.ones(2), cache, grads).tolist() == [15.0, 15.0]
    assert grads == {"a": 15.0, "b": 10.0}  # added to what is there
    part = chain_parts(as_part(scaled("a")), as_part(scaled("b")), first_name="scale")
    first = part.forward(X, {"a": 1.0, "b": 1.0})[1]
    assert (first.first_name, first.second_name) == ("scale", "")


def test_what_has_no_place_gets_no_gradient_and_none_gets_lost():
    grads = {"a": np.zeros(2)}
    add_gradients(grads, ("a", "fixed"), (X, X))
    assert grads.keys() == {"a"} and grads["a"].tolist() == X.tolist()
    for names in (("a",), ("a", "b", "c")):
        with pytest.raises(ValueError, match="zip"):
            add_gradients(grads, names, (X, X))
