"""The laboratory: checks by name, dropout included, and what they say when a mistake is planted."""

import numpy as np
import pytest

from minivit import ViT
from minivit.laboratory import checks as laboratory
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import LAYERS, MODELS
from minivit.laboratory.checks import LIMITS, errors_of, every_check, expose, model_problem, pair_of, relative, v_curves
from minivit.laboratory.mistakes import find


@pytest.mark.parametrize("name", [*LAYERS, *MODELS])
def test_every_check_of_everything(name):
    first, *others = every_check(name, 1)
    assert set(LIMITS) - {"facts"} < set(first)
    for row in (first, *others):
        assert all(row[kind] <= limit for kind, limit in LIMITS.items() if kind in row), row


@pytest.mark.parametrize(("name", "seed"), [("vit-dropout", 24), ("vit-pre_logits", 29)])
def test_truncation_along_a_strongly_curved_direction_is_no_mistake(name, seed):
    central = gradcheck.METHODS["central"]
    assert max(row["central"] for row in every_check(name, seed)) <= LIMITS["central"]
    with pytest.MonkeyPatch.context() as patch:  # with steps that are 6 times as long
        patch.setitem(gradcheck.METHODS, "central", central._replace(step=6 * central.step))
        assert max(row["central"] for row in every_check(name, seed)) > LIMITS["central"]


def test_rounding_at_too_short_a_step_is_no_mistake(monkeypatch):
    central = gradcheck.METHODS["central"]
    monkeypatch.setattr(
        "minivit.laboratory.checks.relative", lambda result, *_: abs(result.analytic - result.numerical)
    )
    monkeypatch.setitem(gradcheck.METHODS, "central", central._replace(step=central.step / 100))
    largest = max(row["central"] for row in every_check("vit-mean", 0))
    monkeypatch.setitem(LIMITS, "central", largest / 2)  # at six times the step, roundings are a sixth
    assert max(row["central"] for row in every_check("vit-mean", 0)) < largest / 2


def test_another_step_hides_no_mistake(monkeypatch):
    forward, backward, args, names = LAYERS["linear"](np.random.default_rng(0))
    off = 1 + 2 * LIMITS["central"]
    wrong = forward, lambda dy, cache: tuple(off * gradient for gradient in backward(dy, cache)), args, names
    monkeypatch.setitem(LAYERS, "linear", lambda rng: wrong)
    figures = [row["central"] for row in every_check("linear", 0)]
    assert len(figures) == 3 and max(figures) > LIMITS["central"]


def test_what_a_difference_cannot_resolve_is_not_counted():
    def figure(**changes):
        values = {"max_relative_error": 0.0, "analytic": 1e-6, "numerical": 1e-6 + 3e-11, "size": 1e-6} | changes
        return relative(gradcheck.Result("x", "central", 6e-6, element=None, checked=1, passed=True, **values))

    assert figure() > 1e-5
    assert figure(rounding=1e-10) == pytest.approx(0.3 * LIMITS["central"])
    assert figure(rounding=1e-11) == pytest.approx(3 * LIMITS["central"])
    assert figure(rounding=1e-10, analytic=np.nan) == np.inf


def test_a_gradient_of_zero_is_right_to_rounding_and_no_further():
    def figure(numerical, analytic=0.0, **among):
        return relative(gradcheck.Result("b", "complex", 1e-30, 0.0, analytic, numerical, None, 1, 0.0, True), **among)

    assert figure(5e-15, -5e-15) < LIMITS["complex"] < figure(1e-13, -1e-13)
    assert figure(1.0, 1.0 + 2e-12) > LIMITS["complex"]
    # where the other gradients of the case are 20, so is what cancelled
    assert figure(1e-13, -1e-13, among=20.0) < LIMITS["complex"] < figure(1e-12, -1e-12, among=20.0)
    assert figure(1.0, 1.0 + 2e-12, among=20.0) > LIMITS["complex"]
    assert figure(5e-15, -5e-15, among=0.1) == figure(5e-15, -5e-15)


def test_dropout_acts_in_every_check_of_a_model_that_has_it():
    forward, backward, args = pair_of("vit-dropout", 0)
    config, flat, images, _ = model_problem("vit-dropout", 0)
    logits = forward(*args)[0]
    assert (forward(*args)[0] == logits).all()
    assert np.abs(logits - ViT(config, flat=flat).forward(images)[0]).max() > 0.1

    def still(flat, images):
        model = ViT(config, flat=flat)
        logits, cache = model.forward(images)
        return logits, (model, cache)

    v = [np.random.default_rng(2).standard_normal(a.shape) for a in args]
    with_dropout, without = (gradcheck.hessian_vector_product(f, backward, args, v)[0] for f in (forward, still))
    assert np.linalg.norm(with_dropout - without) > 0.1 * np.linalg.norm(without)
    assert errors_of("vit-dropout", 0)["symmetry"] == gradcheck.symmetry_error(forward, backward, args)


def test_a_mistake_is_exposed_by_the_checks_that_it_concerns(monkeypatch):
    few = {name: LAYERS[name] for name in ("linear", "layernorm", "softmax", "mlp")}
    monkeypatch.setattr(laboratory, "LAYERS", few)  # all of them: tests/commands/test_command_gradcheck.py
    findings = expose(find("layernorm-dropped-variance"), 0)
    assert any(line.startswith("layernorm dx: analytic") for line in findings)
    assert any(line.startswith("layernorm: u^T H v") for line in findings)
    assert any("of no function" in line for line in findings)
    assert not any(line.startswith("softmax") for line in findings)
    assert any("|W|" not in line and "differences of the gradient" in line
               for line in expose(find("linear-input-abs-weight"), 0))  # fmt: skip


def test_curves_know_what_is_linear():
    curves = v_curves("attention", 0)
    assert list(curves) == ["q", "k", "v"]
    for argument, linear in (("q", False), ("k", False), ("v", True)):
        assert {curve.linear for curve, _ in curves[argument].values()} == {linear}
