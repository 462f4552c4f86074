"""Check every hand-written gradient against numerical derivatives: each layer, the loss, and whole models."""

import sys
import time

import numpy as np

from minivit import InputError, ViT, ViTConfig, gradcheck
from minivit.cli import Parser, run
from minivit.gradcheck_cases import LAYERS, MODELS
from minivit.train import write_json

EXAMPLES = """
examples:
  python scripts/gradcheck.py                        every layer and model, element by element, two methods
  python scripts/gradcheck.py layernorm msa          only these
  python scripts/gradcheck.py --json gradcheck.json  the table as a file too

The exit status is 0 if every gradient agrees, 1 if one does not, 2 for bad input.
"""


def check_all(names, method, seed):
    """Yield (name, results) for each chosen layer and model."""
    for name in names:
        if name in LAYERS:
            forward, backward, args, arguments = LAYERS[name](np.random.default_rng(seed))
            yield (
                name,
                gradcheck.check(forward, backward, args, names=arguments, method=method, elementwise=True, seed=seed),
            )
        else:
            config = ViTConfig(**MODELS[name])
            model = ViT(config, seed=seed, dtype=np.float64)
            rng = np.random.default_rng(seed)
            model.flat += 0.3 * rng.standard_normal(model.flat.shape)  # away from the zeros of the initialisation
            size, channels = config.image_size, config.channels
            images = rng.standard_normal((3, size, size, channels))
            labels = rng.integers(0, config.num_classes, 3)
            yield name, gradcheck.check_model(
                lambda flat, config=config: ViT(config, flat=flat), images, labels, model.flat, method=method,
                elementwise=True, label_smoothing=0.1, seed=seed,
            )  # fmt: skip


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="gradcheck.py")
    known = [*LAYERS, *MODELS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to check: {', '.join(known)} [all]")
    parser.add_argument("--method", choices=(*gradcheck.METHODS, "both"), default="both",
                        help="how to differentiate; both: central and complex [both]")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the random arguments [0]")
    parser.add_argument("--json", metavar="FILE", help="write the table, and max_relative_error, as JSON")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in known:
            raise InputError(f"nothing called {name!r} to check; known: {', '.join(known)}")
    if arguments.seed < 0:
        raise InputError(f"--seed must be at least 0, got {arguments.seed}")
    methods = ("central", "complex") if arguments.method == "both" else (arguments.method,)

    started, rows = time.perf_counter(), []
    print(f"{'':22}{'argument':30}{'numbers':>8}  {'method':8}{'max relative error':>19}")
    for method in methods:
        for name, results in check_all(arguments.names or known, method, arguments.seed):
            for i, r in enumerate(results):
                label, verdict = "" if i else name, "" if r.passed else "  WRONG"
                print(
                    f"{label:22}{r.argument:30}{r.checked:8d}  {method:8}{r.max_relative_error:19.1e}{verdict}",
                    flush=True,
                )
                rows.append({"name": name, **vars(r)})
    wrong = [row for row in rows if not row["passed"]]
    largest = {m: max(row["max_relative_error"] for row in rows if row["method"] == m) for m in methods}
    print(
        f"{sum(row['checked'] for row in rows):,} derivatives in {time.perf_counter() - started:.1f} s; "
        "largest relative error "
        + ", ".join(f"{error:.1e} ({m}, allowed {gradcheck.METHODS[m].rtol:.0e})" for m, error in largest.items())
    )
    for row in wrong:
        print(f"WRONG: {row['name']} d{row['argument']} at {row['element']}: analytic {row['analytic']:.10g}, "
              f"{row['method']} {row['numerical']:.10g}")  # fmt: skip
    if arguments.json:
        report = {
            "passed": not wrong,
            "max_relative_error": max(largest.values()),
            "max_relative_error_by_method": largest,
            "methods": {m: gradcheck.METHODS[m]._asdict() for m in methods},
            "seed": arguments.seed,
            "results": rows,
        }
        write_json(arguments.json, report)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
