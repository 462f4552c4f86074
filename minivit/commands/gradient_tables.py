"""What `minivit gradcheck` prints of its checks: tables of gradients, and the V-curves of a layer."""

import math
import time

from minivit.base.errors import drawing
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import LAYERS, MODELS
from minivit.laboratory.checks import LIMITS, every_check, results_of, v_curves
from minivit.laboratory.facts import FACTS

WIDTH = max(map(len, [*LAYERS, *MODELS])) + 2  # of the column of names


def table_of_elements(names, methods, seed, device="cpu"):
    """Check each element of each gradient; prints a table; returns (rows, the largest error of each method)."""
    rows, started = [], time.perf_counter()
    print(f"{'':{WIDTH}}{'argument':30}{'numbers':>8}  {'method':10}{'max relative error':>19}")
    for method in methods:
        for name in names:
            for i, r in enumerate(results_of(name, method, seed, device=device)):
                label, verdict = "" if i else name, "" if r.verdict == "ok" else f"  {r.verdict}"
                print(
                    f"{label:{WIDTH}}{r.argument:30}{r.checked:8d}  {method:10}{r.max_relative_error:19.1e}{verdict}",
                    flush=True,
                )
                rows.append({"name": name, **vars(r), "by_hand": r.by_hand})
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
            if row["by_hand"]:
                print(f"  {row['by_hand']}")
        elif row["kinks"]:
            print(f"ON A KINK: {row['name']} d{row['argument']}: {row['diagnosis']}")
    return rows, largest


def table_of_everything(names, facts, seed):
    """Every check there is, along random directions; prints a table; returns (rows, the largest of each column)."""
    rows, started = [], time.perf_counter()
    columns = [kind for kind in LIMITS if kind != "facts"]
    if names:
        print(f"{'':{WIDTH}}{'argument':30}" + "".join(f"{kind:>10}" for kind in columns))
    for name in names:
        for i, row in enumerate(every_check(name, seed)):
            rows.append(row)
            figures = "".join(f"{row[kind]:10.1e}" for kind in columns if kind in row)
            print(f"{'' if i else name:{WIDTH}}{row['argument']:30}{figures}", flush=True)
    for name in facts:
        rows.append({"name": name, "facts": FACTS[name]()})
        print(f"{name.replace('_', ' '):{WIDTH + 30}}{rows[-1]['facts']:10.1e}")
    largest = {
        kind: max(row[kind] for row in rows if kind in row) for kind in LIMITS if any(kind in row for row in rows)
    }
    print(f"{time.perf_counter() - started:.1f} s; the largest:")
    for kind, value in largest.items():
        print(f"  {kind:10}{value:10.1e}  allowed {LIMITS[kind]:.0e}{'' if value <= LIMITS[kind] else '  EXCEEDED'}")
    return rows, largest


THEORY = """
How to read it. A numerical derivative subtracts two values of the function that lie h apart and divides by h.
  Truncation, on the right: the curve between the two points is not straight. The error is C h^order, a line of slope
    1 (forward), 2 (central), 4 (five-point) in these logarithmic axes. Predictions take C = 1.
  Rounding, on the left: each value carries an error of about eps (2.2e-16 in float64, 1.2e-7 in float32), and the
    division by h turns it into R eps / h, a line of slope -1. R is the size of the values, |dy * y|, over that of the
    derivative.
  The knee, where the two meet, is predicted at h = (R eps)^(1 / (order + 1)), with an error of
    (R eps)^(order / (order + 1)). That is why gradients are not checked in float32: eps is 2^29 times as large, so the
    best error is 2e4 (forward), 7e5 (central) and 1e7 (five-point) times that of float64: many wrong gradients pass.
    Right of a knee in float32 there is hardly room to measure a slope.
  At the far left h is too small for x to move at all: x + h = x, the difference is 0 and the error 1.
  The complex step subtracts nothing: below h = 1e-8 its truncation h^2 is less than eps, and it stays flat for ever.
  A function that is linear in an argument has no truncation at all: there, the larger h, the better.
"""


def depth(name, seed, out):
    """The V-curves of one layer: prints them in numbers, draws them; returns a JSON-ready dict."""
    print(f"{name}: error of each numerical derivative along a random direction, over 82 steps from 1e-14 to 0.3")
    heads = ("best step", "predicted", "best error", "predicted", "slope", "theory")
    print(f"{'argument':20}{'method':12}{'dtype':9}" + "".join(f"{head:>12}" for head in heads))
    panels, report = v_curves(name, seed), {}
    for argument, curves in panels.items():
        report[argument] = []
        for (method, kind), (_, knee) in curves.items():
            predicted = f"{knee.predicted_step:.0e}", f"{knee.predicted_error:.1e}"
            predicted = ("any", "-") if method == "complex" else predicted if knee.predicted_error else ("large", "-")
            slope = "-" if math.isnan(knee.slope) else f"{knee.slope:.2f}"
            numbers = (f"{knee.step:.0e}", predicted[0], f"{knee.error:.1e}", predicted[1], slope)
            order = gradcheck.METHODS[method].order
            print(f"{argument:20}{method:12}{kind:9}" + "".join(f"{number:>12}" for number in (*numbers, order)))
            finite = {key: value if math.isfinite(value) else None for key, value in knee._asdict().items()}
            report[argument].append({"method": method, "dtype": kind, **finite})
    print(THEORY)
    figure = out / f"v-curve-{name}.png"
    with drawing():
        from minivit import figures  # matplotlib is slow to import

        out.mkdir(parents=True, exist_ok=True)
        figures.save_v_curves(figure, panels, title=f"{name}: how exact a numerical derivative can be")
        print(f"drawn in {figure}")
    return report
