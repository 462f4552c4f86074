"""Check every hand-written gradient, look into one of them, or plant a mistake and watch what exposes it."""

import dataclasses
import difflib
import importlib.util
import random
import sys
import time
from pathlib import Path

import numpy as np

from minivit import InputError, ViT, ViTConfig, gradcheck
from minivit.cli import Parser, output_file, run
from minivit.curvature import hessian_vector_product
from minivit.facts import FACTS, TOLERANCE
from minivit.gradcheck_cases import JVPS, LAYERS, MODEL_BATCH, MODELS, NEED_SCIPY
from minivit.mistakes import BY_NAME, find, planted, source_of
from minivit.train import quiet_overflow, write_json

EXAMPLES = """
examples:
  python scripts/gradcheck.py                        every layer and model, element by element, two methods
  python scripts/gradcheck.py layernorm msa          only these
  python scripts/gradcheck.py --all                  along random directions: all methods, adjoint, second derivatives
  python scripts/gradcheck.py layernorm --depth      the error of each method against its step, explained and drawn
  python scripts/gradcheck.py --against torch        every tensor, forward and backward, against PyTorch's
  python scripts/gradcheck.py --plant list           the zoo of mistakes
  python scripts/gradcheck.py --plant softmax-square what exposes this one
  python scripts/gradcheck.py --plant random         hides one: find it (type hint, answer, a function's name, or quit)

The exit status is 0 if every gradient agrees (for --plant: if the mistake was exposed), 1 if not, 2 for bad input.
"""
DTYPES = (np.float64, np.float32)


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


def results_of(name, method, seed, *, elementwise=True):
    """The `gradcheck.Result` list of one layer or model."""
    if name in LAYERS:
        forward, backward, args, arguments = LAYERS[name](np.random.default_rng(seed))
        return gradcheck.check(
            forward, backward, args, names=arguments, method=method, elementwise=elementwise, seed=seed
        )
    config, flat, images, labels = model_problem(name, seed)
    return gradcheck.check_model(
        lambda flat: ViT(config, flat=flat), images, labels, flat, method=method, elementwise=elementwise,
        label_smoothing=0.1, seed=seed,
    )  # fmt: skip


def adjoint_and_symmetry(name, seed):
    """Adjoint error and symmetry error of the second derivatives, of one layer or model."""
    if name in LAYERS:
        forward, backward, args, _ = LAYERS[name](np.random.default_rng(seed))
        adjoint = gradcheck.adjoint_error(forward, backward, JVPS[name.partition("-")[0]], args, seed=seed)
        return adjoint, gradcheck.symmetry_error(forward, backward, args, seed=seed)
    config, flat, images, labels = model_problem(name, seed)
    model = ViT(config, flat=flat)

    def forward(flat, images):
        logits, cache = ViT(config, flat=flat).forward(images, rng=np.random.default_rng(seed))
        return logits, cache

    def backward(dlogits, cache):
        gradient, grads = model.gradient_buffer()
        dimages = model.backward(dlogits, cache, grads, need_dimages=True)
        return gradient, dimages

    def jvp(flatdot, imagesdot, cache):
        return model.jvp(imagesdot, flatdot, cache)

    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((2, flat.size))
    Hu, Hv = (hessian_vector_product(config, flat, images, labels, x) for x in (u, v))
    symmetry = abs(u @ Hv - v @ Hu) / (np.linalg.norm(u) * np.linalg.norm(Hv))
    return gradcheck.adjoint_error(forward, backward, jvp, [flat, images], seed=seed), float(symmetry)


def relative(result):
    """|a - n| / max(|a|, |n|, s) of a check along one direction; s is the size of such derivatives on average.

    A random direction may happen to lie nearly across the gradient: then a and n are small, but not their rounding.
    """
    if not np.isfinite([result.analytic, result.numerical, result.size]).all():
        return np.inf  # a NaN must not pass for small
    scale = max(abs(result.analytic), abs(result.numerical), result.size)
    return abs(result.analytic - result.numerical) / scale if scale else 0.0


def table_of_elements(names, methods, seed):
    """Check each element of each gradient; prints a table; returns (rows, the largest error of each method)."""
    rows, started = [], time.perf_counter()
    print(f"{'':22}{'argument':30}{'numbers':>8}  {'method':10}{'max relative error':>19}")
    for method in methods:
        for name in names:
            for i, r in enumerate(results_of(name, method, seed)):
                label, verdict = "" if i else name, "" if r.passed else "  WRONG"
                print(
                    f"{label:22}{r.argument:30}{r.checked:8d}  {method:10}{r.max_relative_error:19.1e}{verdict}",
                    flush=True,
                )
                rows.append({"name": name, **vars(r)})
    largest = {m: max(row["max_relative_error"] for row in rows if row["method"] == m) for m in methods}
    print(
        f"{sum(row['checked'] for row in rows):,} derivatives in {time.perf_counter() - started:.1f} s; "
        "largest relative error "
        + ", ".join(f"{error:.1e} ({m}, allowed {gradcheck.METHODS[m].rtol:.0e})" for m, error in largest.items())
    )
    for row in rows:
        if not row["passed"]:
            print(
                f"WRONG: {row['name']} d{row['argument']} at {row['element']}: analytic {row['analytic']:.10g}, "
                f"{row['method']} {row['numerical']:.10g}; {row['diagnosis']}"
            )
    return rows, largest


# What --all allows; each is a relative error.
LIMITS = {"complex": 1e-12, "central": 1e-8, "adjoint": 1e-13, "symmetry": 1e-12, "facts": TOLERANCE}


def table_of_everything(names, seed):
    """Every check there is, along random directions; prints a table; returns (rows, the largest of each column)."""
    rows, started = [], time.perf_counter()
    print(f"{'':22}{'argument':30}{'complex':>10}{'central':>10}{'adjoint':>10}{'symmetry':>10}")
    for name in names:
        exact, central = (results_of(name, method, seed, elementwise=False) for method in ("complex", "central"))
        adjoint, symmetry = (e if np.isfinite(e) else np.inf for e in adjoint_and_symmetry(name, seed))
        for i, (a, b) in enumerate(zip(exact, central, strict=True)):
            row = {"name": name, "argument": a.argument, "complex": relative(a), "central": relative(b)}
            row |= {"adjoint": adjoint, "symmetry": symmetry} if i == 0 else {}
            rows.append(row)
            figures = [f"{row[key]:10.1e}" for key in ("complex", "central", "adjoint", "symmetry") if key in row]
            print(f"{'' if i else name:22}{a.argument:30}{''.join(figures)}", flush=True)
    for name, fact in FACTS.items():
        rows.append({"name": name, "facts": fact()})
        print(f"{name.replace('_', ' '):52}{rows[-1]['facts']:10.1e}")
    largest = {key: max(row[key] for row in rows if key in row) for key in LIMITS}
    print(f"{time.perf_counter() - started:.1f} s; the largest:")
    for key, value in largest.items():
        print(f"  {key:10}{value:10.1e}  allowed {LIMITS[key]:.0e}{'' if value <= LIMITS[key] else '  EXCEEDED'}")
    return rows, largest


THEORY = """
How to read it. A numerical derivative subtracts two values of the function that lie h apart and divides by h.
  Truncation, on the right: the curve between the two points is not straight. The error is C h^order, a line of slope
    1 (forward), 2 (central), 4 (five-point) in these logarithmic axes.
  Rounding, on the left: each value carries an error of about eps (2.2e-16 in float64, 1.2e-7 in float32), and the
    division by h turns it into eps / h, a line of slope -1.
  The knee, where the two meet, is at h ~ eps^(1 / (order + 1)); no step does better than eps^(order / (order + 1)).
    That is why gradients are not checked in float32: its best is 3e-4, 2e-5 and 3e-6, which many wrong gradients pass.
  The complex step subtracts nothing: below h = 1e-8 its truncation h^2 is less than eps, and it stays flat for ever.
  A function that is linear in an argument has no truncation at all: there, the larger h, the better.
"""


def depth(name, seed, out):
    """The V-curves of one layer: prints them in numbers, draws them; returns a JSON-ready dict."""
    from minivit import plots  # matplotlib is slow to import

    forward, _, args, arguments = LAYERS[name](np.random.default_rng(seed))
    panels, report = {}, {}
    print(f"{name}: error of each numerical derivative along a random direction, over 82 steps from 1e-14 to 0.3")
    heads = ("best step", "predicted", "best error", "slope", "theory")
    print(f"{'argument':16}{'method':12}{'dtype':9}" + "".join(f"{head:>12}" for head in heads))
    for i, argument in enumerate(arguments):
        if not (isinstance(args[i], np.ndarray) and args[i].dtype.kind == "f"):
            continue
        panels[argument], report[argument] = {}, []
        # one-sided differences of a linear function have no truncation: their error falls up to the largest step
        linear = gradcheck.error_curve(forward, args, i, "forward", steps=[0.1, 0.3], seed=seed).errors.max() < 1e-9
        for method, (_, _, _, order) in gradcheck.METHODS.items():
            for dtype in DTYPES[:1] if method == "complex" else DTYPES:
                curve = gradcheck.error_curve(forward, args, i, method, dtype=dtype, seed=seed)
                found = gradcheck.knee(curve, method, dtype)
                kind = dtype.__name__
                panels[argument][method, kind] = curve, found
                predicted = "any" if method == "complex" else "large" if linear else f"{found.predicted_step:.0e}"
                slope = "-" if linear or np.isnan(found.slope) else f"{found.slope:.2f}"
                figures = (f"{found.step:.0e}", predicted, f"{found.error:.1e}", slope, str(order))
                print(f"{argument:16}{method:12}{kind:9}" + "".join(f"{figure:>12}" for figure in figures))
                report[argument].append({"method": method, "dtype": kind, **found._asdict()})
    print(THEORY)
    out.mkdir(parents=True, exist_ok=True)
    figure = out / f"v-curve-{name}.png"
    plots.save_v_curves(figure, panels, title=f"{name}: how exact a numerical derivative can be")
    print(f"drawn in {figure}")
    return report


def expose(mistake, seed):
    """Run every check with a mistake planted; the findings as lines of text, function names of the source left out."""
    findings = []

    def attempt(what, check):
        try:
            findings.extend(check())
        except (ValueError, TypeError, IndexError) as error:
            findings.append(f"{what} fails: {str(error).splitlines()[0]}")

    def gradients(name):
        for r in results_of(name, "complex", seed):
            if not r.passed:
                yield f"{name} d{r.argument}: analytic {r.analytic:.6g}, complex step {r.numerical:.6g}; {r.diagnosis}"

    def adjoint(name):
        adjoint, symmetry = adjoint_and_symmetry(name, seed)
        if not adjoint < LIMITS["adjoint"]:
            yield f"{name}: <J v, u> and <v, J^T u> differ by {adjoint:.1e}"
        if not symmetry < LIMITS["symmetry"]:
            yield f"{name}: u^T H v and v^T H u differ by {symmetry:.1e}: this is the gradient of no function"

    def fact(name):
        if not (error := FACTS[name]()) <= TOLERANCE:
            yield f"not so: {FACTS[name].__doc__} (off by {error:.1e})"

    with planted(mistake.name), quiet_overflow():
        for name in FACTS:
            attempt(name, lambda name=name: fact(name))
        for name in available(LAYERS):
            attempt(name, lambda name=name: gradients(name))
            attempt(name, lambda name=name: adjoint(name))
        if len(findings) < 3:
            for name in available(MODELS):
                attempt(name, lambda name=name: gradients(name))
    return findings


def show(findings, limit=12):
    """Print findings, the first few of them."""
    for line in findings[:limit]:
        print(f"  {line}")
    if len(findings) > limit:
        print(f"  ... and {len(findings) - limit} more")


def answer(mistake):
    """Print what a mistake is and the lines that it changed."""
    right, wrong = (text.splitlines() for text in source_of(mistake))
    print(f"{mistake.name}: in {mistake.module}.{mistake.function}, {mistake.about}")
    for line in difflib.ndiff(right, wrong):
        if line[0] in "+-":
            print(f"  {line[0]} {line[2:].strip()}")
    if mistake.seen:
        print(f"  seen: {mistake.seen}")


def plant(name, seed):
    """Show what exposes a mistake; returns the exit status."""
    if name == "list":
        for mistake in BY_NAME.values():
            print(f"{mistake.name:34}{mistake.module.removeprefix('minivit.')}.{mistake.function}")
        print(f"{len(BY_NAME)} mistakes; --plant NAME shows what exposes one, --plant random hides one")
        return 0
    if name != "random":
        mistake = find(name)
        answer(mistake)
        findings = expose(mistake, seed)
        print("exposed by" if findings else "NOT EXPOSED")
        show(findings)
        return 0 if findings else 1
    mistake = random.choice(list(BY_NAME.values()))
    findings = expose(mistake, seed)
    print("The checks were run with one mistake in the code. This is what they said:")
    show(findings)
    print('In which function is it? Type its name, or "hint", "answer", "quit".')
    for line in sys.stdin:
        guess = line.strip().lower()
        if guess in ("quit", "answer"):
            break
        if guess == "hint":
            print(mistake.hint)
        elif guess and guess in (mistake.function.lower(), mistake.function.rpartition(".")[2].lower(), mistake.name):
            print("Yes.")
            break
        elif guess:
            print(f"Not in {guess}.")
    answer(mistake)
    return 0 if findings else 1


def against(names, seed, json_file):
    """Compare whole models with PyTorch, tensor by tensor; returns the exit status."""
    from minivit.against_torch import LIMIT, compare

    report, diverging = {}, 0
    print(f"{'':16}{'tensors':>8}{'largest difference':>20}   where")
    for name in names:
        config, flat, images, labels = model_problem(name, seed)
        config = dataclasses.replace(config, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
        compared = compare(config, flat, images, labels, label_smoothing=0.1)
        worst = max(compared, key=lambda each: each.error)
        print(f"{name:16}{len(compared):8d}{worst.error:20.1e}   {worst.direction} {worst.path} {worst.name}")
        report[name] = [each._asdict() for each in compared]
        if first := next((each for each in compared if not each.error <= LIMIT), None):
            diverging += 1
            others = sum(not each.error <= LIMIT for each in compared) - 1
            print(
                f"  the first to differ: {first.name} of {first.path} in the {first.direction} pass, {first.shape}, "
                f"by {first.error:.1e}; {others} more follow"
            )
    if json_file:
        write_json(json_file, report)
    return 1 if diverging else 0


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="gradcheck.py")
    known = [*LAYERS, *MODELS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to check: {', '.join(known)} [all]")
    parser.add_argument("--method", choices=(*gradcheck.METHODS, "both"), default="both",
                        help="how to differentiate; both: central and complex [both]")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--all", action="store_true", help="all kinds of checks, along random directions")
    mode.add_argument("--depth", action="store_true", help="V-curves of the named layers")
    mode.add_argument("--against", choices=("torch",), help="compare every tensor of the named models with PyTorch's")
    mode.add_argument("--plant", metavar="MISTAKE", help="plant a mistake: its name, list, or random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random arguments [0]")
    parser.add_argument("--out", metavar="DIR", default=".", help="folder for the figures of --depth [.]")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the table, and max_relative_error, as JSON"
    )
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in known:
            raise InputError(f"nothing called {name!r} to check; known: {', '.join(known)}")
    if arguments.seed < 0:
        raise InputError(f"--seed must be at least 0, got {arguments.seed}")
    if arguments.plant:
        return plant(arguments.plant, arguments.seed)
    if arguments.against:
        if any(name in LAYERS for name in arguments.names):
            raise InputError(f"--against compares whole models: {', '.join(MODELS)}")
        return against(available(arguments.names or MODELS), arguments.seed, arguments.json)
    names = available(arguments.names or known)
    if skipped := [name for name in arguments.names or known if name not in names]:
        print(f'skipped, for want of SciPy (pip install "minivit[interop]"): {", ".join(skipped)}')
    if arguments.depth:
        if not arguments.names or any(name in MODELS for name in arguments.names):
            raise InputError(f"--depth needs the name of a layer: {', '.join(LAYERS)}")
        report = {name: depth(name, arguments.seed, Path(arguments.out)) for name in names}
        passed = True
    elif arguments.all:
        rows, largest = table_of_everything(names, arguments.seed)
        passed = all(largest[key] <= limit for key, limit in LIMITS.items())
        report = {"passed": passed, "largest": largest, "limits": LIMITS, "seed": arguments.seed, "results": rows}
    else:
        methods = ("central", "complex") if arguments.method == "both" else (arguments.method,)
        rows, largest = table_of_elements(names, methods, arguments.seed)
        passed = all(row["passed"] for row in rows)
        report = {
            "passed": passed,
            "max_relative_error": max(largest.values()),
            "max_relative_error_by_method": largest,
            "methods": {m: gradcheck.METHODS[m]._asdict() for m in methods},
            "seed": arguments.seed,
            "results": rows,
        }
    if arguments.json:
        write_json(arguments.json, report)
    return 0 if passed else 1


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
