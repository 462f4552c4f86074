"""Every check there is, of a layer or model by its name, and what they say when a mistake is planted.

The names are those of `minivit.laboratory.cases`; `minivit gradcheck` prints what the checks say.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from minivit.base.finite import quiet_overflow
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import LAYERS, MODEL_BATCH, MODELS, NEED_SCIPY
from minivit.laboratory.facts import FACTS, TOLERANCE
from minivit.laboratory.mistakes import planted
from minivit.model import ViT, ViTConfig

# What is allowed; each is a relative error. Central differences cannot do better than "central" and "hessian".
LIMITS = {
    "complex": 1e-12, "central": 1e-8, "symmetry": 1e-12, "hessian": 1e-8, "facts": TOLERANCE,
}  # fmt: skip


def available(names):
    """Those of the names that can be checked here: without SciPy, the exact GELU cannot."""
    return [name for name in names if name not in NEED_SCIPY or importlib.util.find_spec("scipy")]


def model_problem(name, seed):
    """(config, flat, images, labels) of a small model away from the zeros of its initialisation."""
    config = ViTConfig(**MODELS[name])
    rng = np.random.default_rng(seed)
    flat = ViT(config, seed=seed, dtype=np.float64).flat
    flat += 0.3 * rng.standard_normal(flat.shape)
    images = rng.standard_normal((MODEL_BATCH, config.image_size, config.image_size, config.channels))
    return config, flat, images, rng.integers(0, config.num_classes, MODEL_BATCH)


def results_of(name, method, seed, *, step=None, elementwise=True, device="cpu"):
    """The `gradcheck.Result` list of one layer or model, computed on a device."""
    if name in LAYERS:
        forward, backward, args, arguments = LAYERS[name](np.random.default_rng(seed))
        return gradcheck.check(
            *gradcheck.on_device(forward, backward, device),
            args,
            names=arguments,
            method=method,
            step=step,
            elementwise=elementwise,
            seed=seed,
        )
    config, flat, images, labels = model_problem(name, seed)
    return gradcheck.check_model(
        lambda flat: ViT(config, flat=flat), images, labels, flat, method=method, step=step, elementwise=elementwise,
        label_smoothing=0.1, seed=seed, device=device,
    )  # fmt: skip


def pair_of(name, seed):
    """(forward, backward, args) of one layer, or of a model as a function of its parameters and images."""
    if name in LAYERS:
        forward, backward, args, _ = LAYERS[name](np.random.default_rng(seed))
        return forward, backward, args
    config, flat, images, _ = model_problem(name, seed)

    def forward(flat, images):  # dropout is active, with the same masks at each call
        model = ViT(config, flat=flat)
        logits, cache = model.forward(images, rng=np.random.default_rng(seed))
        return logits, (model, cache)

    def backward(dlogits, cache):
        model, cache = cache
        gradient, grads = model.gradient_buffer()
        dimages = model.backward(dlogits, cache, grads)
        return gradient, dimages

    return forward, backward, [flat, images]


def errors_of(name, seed):
    """{kind: error} of the checks of all arguments together: two of the second derivatives.

    A check that a backward with NaN in it does not allow, or one that is not analytic, has an infinite error.
    """
    forward, backward, args = pair_of(name, seed)
    checks = {
        "symmetry": lambda: gradcheck.symmetry_error(forward, backward, args, seed=seed),
        "hessian": lambda: gradcheck.hessian_error(forward, backward, args, seed=seed),
    }
    errors = {}
    for kind, error in checks.items():
        try:
            errors[kind] = error()
        except gradcheck.CannotTellError:
            errors[kind] = np.inf
    return errors


def relative(result, among=1.0):
    """|a - n| / max(|a|, |n|, s, r) of a check along one direction: the relative error where it can be measured.

    s is the size of such derivatives on average: a random direction may happen to lie nearly across the gradient, then
    a and n are small, but not their rounding. r is what a difference can still resolve to LIMITS["central"]: its own
    rounding, eps sum|dy y| / h, over that limit. For the complex step it is a hundred roundings of numbers of order 1,
    or of the largest gradient ``among`` those of the case, over its limit: where a gradient is zero, as that of a bias
    that softmax ignores, a and n are both rounding, and the cases have some hundred scores, each of which brings in its
    own.
    """
    if not np.isfinite([result.analytic, result.numerical, result.size]).all():
        return np.inf  # a NaN must not pass for small
    resolved = result.rounding / LIMITS["central"]
    if result.method == "complex":
        resolved = 100 * np.finfo(np.float64).eps * max(1.0, among) / LIMITS["complex"]
    scale = max(abs(result.analytic), abs(result.numerical), result.size, resolved)
    return abs(result.analytic - result.numerical) / scale if scale else 0.0


def every_check(name, seed):
    """All checks of one layer or model along random directions: a dict per argument, the first with `errors_of` too.

    "complex" and "central" are the figures of `relative`. Where one of a central difference is beyond its limit, the
    best one of three steps is taken, h, h / 6 and 6 h: the truncation of a function that is strongly curved along the
    direction drawn falls with h^2, the rounding of a long sum with 1 / h, a mistake stays.
    """
    exact, central = (results_of(name, method, seed, elementwise=False) for method in ("complex", "central"))
    figures = [relative(result) for result in central]
    for factor in (1 / 6, 6):
        if not max(figures) <= LIMITS["central"]:
            step = factor * gradcheck.METHODS["central"].step
            others = results_of(name, "central", seed, step=step, elementwise=False)
            figures = [min(figure, relative(result)) for figure, result in zip(figures, others, strict=True)]
    among = max((result.size for result in exact if np.isfinite(result.size)), default=1.0)
    rows = [
        {"name": name, "argument": a.argument, "complex": relative(a, among), "central": figure}
        for a, figure in zip(exact, figures, strict=True)
    ]
    return [rows[0] | errors_of(name, seed), *rows[1:]]


def v_curves(name, seed):
    """The V-curves of one layer: {argument: {(method, dtype name): (`gradcheck.Curve`, `gradcheck.Knee`)}}."""
    forward, _, args, arguments = LAYERS[name](np.random.default_rng(seed))
    found = {}
    for i, (argument, a) in enumerate(zip(arguments, args, strict=True)):
        if not (isinstance(a, np.ndarray) and a.dtype.kind == "f"):
            continue
        found[argument] = {}
        for method in gradcheck.METHODS:
            for dtype in (np.float64,) if method == "complex" else (np.float64, np.float32):
                curve = gradcheck.error_curve(forward, args, i, method, dtype=dtype, seed=seed)
                found[argument][method, dtype.__name__] = curve, gradcheck.knee(curve, method, dtype)
    return found


def expose(mistake, seed):
    """Run every check with a mistake planted; the findings as lines of text, function names of the source left out."""
    findings = []

    def attempt(what, check):
        try:
            findings.extend(check(what))
        except (ValueError, TypeError, IndexError) as error:
            findings.append(f"{what} fails: {str(error).splitlines()[0]}")

    def gradients(name):
        if all(r.passed for r in results_of(name, "complex", seed, elementwise=False)):
            return  # there are thousands of elements, and a random direction sees a mistake in any
        for r in results_of(name, "complex", seed):
            if not r.passed:
                yield f"{name} d{r.argument}: analytic {r.analytic:.6g}, complex step {r.numerical:.6g}; {r.diagnosis}"

    def identities(name):
        words = {
            "symmetry": "u^T H v and v^T H u differ by {:.1e}: this is the gradient of no function",
            "hessian": "H v by complex step and by differences of the gradient differ by {:.1e}",
        }
        for kind, error in errors_of(name, seed).items():
            if error == np.inf:
                yield f"{name}: the {kind} test cannot be made: the gradient is not finite, or not analytic"
            elif not error <= LIMITS[kind]:
                yield f"{name}: {words[kind].format(error)}"

    def fact(name):
        if not (error := FACTS[name]()) <= TOLERANCE:
            yield f"not so: {FACTS[name].__doc__} (off by {error:.1e})"

    with planted(mistake.name), quiet_overflow():
        for name in FACTS:
            attempt(name, fact)
        for name in available(LAYERS):
            attempt(name, gradients)
            attempt(name, identities)
        for name in available(MODELS):
            if len(findings) < 3:
                attempt(name, gradients)
    return findings
