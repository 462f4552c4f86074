"""Check every hand-written gradient, look into one of them, or plant a mistake and watch what exposes it."""

import dataclasses
import difflib
import math
import random
import sys
import time
from pathlib import Path

from minivit import InputError
from minivit.base.backend import find_device, use_device
from minivit.base.files import write_json
from minivit.base.finite import quiet_overflow
from minivit.commands.cli import Parser, output_file
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import LAYERS, MODELS
from minivit.laboratory.checks import LIMITS, available, every_check, expose, model_problem, results_of, v_curves
from minivit.laboratory.facts import FACTS
from minivit.laboratory.mistakes import BY_NAME, find, planted, source_of

EXAMPLES = """
examples:
  minivit gradcheck                        every layer and model, element by element, two methods
  minivit gradcheck layernorm msa          only these
  minivit gradcheck layernorm --device cuda   its gradient on a GPU, in float64
  minivit gradcheck --all                  along random directions: both methods, second derivatives
  minivit gradcheck layernorm --depth      the error of each method against its step, explained and drawn
  minivit gradcheck --against torch        every tensor, forward and backward, against PyTorch's
  minivit gradcheck --plant list           the zoo of mistakes
  minivit gradcheck --plant softmax-square what exposes this one
  minivit gradcheck --plant random         hides one: find it with the checks, hints and guesses it takes

The exit status is 0 if every gradient agrees (for --plant: if the mistake was exposed), 1 if not, 2 for bad input.
"""


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
    from minivit import figures  # matplotlib is slow to import

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
    out.mkdir(parents=True, exist_ok=True)
    figure = out / f"v-curve-{name}.png"
    figures.save_v_curves(figure, panels, title=f"{name}: how exact a numerical derivative can be")
    print(f"drawn in {figure}")
    return report


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
    """List the mistakes, or show what exposes one; returns the exit status."""
    if name == "list":
        for mistake in BY_NAME.values():
            print(f"{mistake.name:34}{mistake.module.removeprefix('minivit.')}.{mistake.function}")
        print(f"{len(BY_NAME)} mistakes; --plant NAME shows what exposes one, --plant random hides one")
        return 0
    mistake = find(name)
    answer(mistake)
    findings = expose(mistake, seed)
    print("exposed by" if findings else "NOT EXPOSED")
    show(findings)
    return 0 if findings else 1


HUNT = """In which function is it? Type its name, or
  check NAME     the gradients of a layer or model, element by element
  along NAME     its gradients along random directions, and the second derivatives
  depth NAME     the V-curves of a layer's forward
  facts          the facts that need no derivative
  hint, answer, quit (which shows no answer)"""


def investigate(words, seed, out):
    """Run one of the checks of a hunt and print it; False if the words ask for none."""
    command, *names = words
    checks = {
        "check": lambda: table_of_elements(names, ("complex",), seed),
        "along": lambda: table_of_everything(names, (), seed),
        "depth": lambda: [depth(name, seed, out) for name in names],
        "facts": lambda: table_of_everything((), FACTS, seed),
    }
    if command not in checks:
        return False
    known = available(LAYERS if command == "depth" else [*LAYERS, *MODELS])
    unknown = [name for name in names if name not in known]
    if unknown or (not names and command != "facts"):
        print(f"{command} needs the name of one of these: {', '.join(known)}")
        return True
    try:
        checks[command]()
    except (ValueError, TypeError, IndexError) as error:  # of the code with the mistake in it
        print(f"{command} fails: {str(error).splitlines()[0]}")
    return True


def hunt(choice, seed, out):
    """Hide the mistake that the number ``choice`` draws and answer the reader's checks and guesses from stdin.

    The answer is shown after the right guess and where it is asked for. Returns the exit status.
    """
    mistake = random.Random(choice).choice(list(BY_NAME.values()))
    findings = expose(mistake, seed)
    print(f"One mistake is in the code (--seed {choice} hides the same again). This is what the checks say of it:")
    show(findings)
    print(HUNT)
    solved = False
    with planted(mistake.name), quiet_overflow():
        for line in sys.stdin:
            guess = line.strip().lower()
            if guess in ("quit", "answer"):
                solved = guess == "answer"
                break
            if guess == "hint":
                print(mistake.hint)
            elif guess in (mistake.function.lower(), mistake.function.rpartition(".")[2].lower(), mistake.name):
                print("Yes.")
                solved = True
                break
            elif guess and not investigate(guess.split(), seed, out):
                print(f"Not in {guess}.")
    if solved:
        answer(mistake)
    else:
        print(f"Not found. --plant random --seed {choice} hides the same again; there, type answer to see it.")
    return 0 if findings else 1


def against(names, seed, json_file):
    """Compare whole models with PyTorch, tensor by tensor; returns the exit status."""
    from minivit.laboratory.against_torch import LIMIT, compare

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


def parse(argv):
    """The command line as a namespace.

    Raises  InputError: a name of nothing that is checked, a flag that the chosen mode would not look at, a bad seed.
    """
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="gradcheck")
    known = [*LAYERS, *MODELS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to check: {', '.join(known)} [all]")
    parser.add_argument("--method", choices=(*gradcheck.METHODS, "both"),
                        help="how to differentiate; both: central and complex [both]")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--all", action="store_true", help="all kinds of checks, along random directions")
    mode.add_argument("--depth", action="store_true", help="V-curves of the named layers")
    mode.add_argument("--against", choices=("torch",), help="compare every tensor of the named models with PyTorch's")
    mode.add_argument("--plant", metavar="MISTAKE", help="plant a mistake: its name, list, or random")
    parser.add_argument("--seed", type=int, help="seed of the random arguments [0], and of --plant random [any]")
    parser.add_argument("--device", default="cpu", metavar="NAME",
                        help="where to compute what is checked: cpu, cuda, cuda:1, ... or auto [cpu]")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder for the figures of --depth [.]")
    parser.add_argument("--json", type=output_file, metavar="FILE",
                        help="write the table, and max_relative_error, as JSON")  # fmt: skip
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in known:
            plain = dict.fromkeys(each.partition("-")[0] for each in known)
            raise InputError(f"nothing called {name!r} to check; --help lists variants of {', '.join(plain)}")
    refuse_ignored(arguments)
    if arguments.seed is not None and arguments.seed < 0:
        raise InputError(f"--seed must be at least 0, got {arguments.seed}")
    return arguments


def refuse_ignored(arguments):
    """Refuse what a mode would not look at.

    Raises  InputError: names or --json with --plant; --method with any mode; --out where nothing is drawn; layers with
    --against, models with --depth; a device for anything but the table of every element.
    """
    modes = {
        "--all": arguments.all,
        "--depth": arguments.depth,
        "--against": arguments.against,
        "--plant": arguments.plant is not None,
    }
    mode = next((flag for flag, chosen in modes.items() if chosen), None)
    if mode == "--plant" and arguments.names:
        raise InputError(f"--plant runs every check; it takes no {arguments.names[0]}")
    if mode == "--plant" and arguments.json:
        raise InputError("--plant writes no table: leave --json out")
    if mode and arguments.method:
        raise InputError(f"{mode} chooses its methods itself: leave --method out")
    if arguments.out and mode != "--depth" and arguments.plant != "random":
        raise InputError("--out is the folder for what --depth draws: nothing is drawn without it")
    if mode == "--against" and any(name in LAYERS for name in arguments.names):
        raise InputError(f"--against compares whole models: {', '.join(MODELS)}")
    if mode == "--depth" and (not arguments.names or any(name in MODELS for name in arguments.names)):
        raise InputError(f"--depth needs the name of a layer: {', '.join(LAYERS)}")
    if mode and find_device(arguments.device) != "cpu":
        raise InputError("--device is for the table of every element; the other checks run on the CPU")


def elements(names, arguments):
    """The table of every element: (whether all derivatives are right, the report for JSON)."""
    methods = ("central", "complex") if arguments.method in (None, "both") else (arguments.method,)
    seed = arguments.seed or 0
    rows, largest = table_of_elements(names, methods, seed, find_device(arguments.device))
    passed = all(row["passed"] for row in rows)
    return passed, {
        "passed": passed,
        "max_relative_error": max(largest.values()),
        "max_relative_error_by_method": largest,
        "methods": {m: gradcheck.METHODS[m]._asdict() for m in methods},
        "seed": seed,
        "results": rows,
    }


def everything(names, seed):
    """The table of all kinds of checks: (whether all are within their limits, the report for JSON)."""
    rows, largest = table_of_everything(names, FACTS, seed)
    passed = all(largest[kind] <= limit for kind, limit in LIMITS.items())
    return passed, {"passed": passed, "largest": largest, "limits": LIMITS, "seed": seed, "results": rows}


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    seed, out = arguments.seed or 0, Path(arguments.out or ".")
    use_device(find_device(arguments.device))
    if arguments.plant == "random":
        return hunt(random.randrange(10**6) if arguments.seed is None else seed, seed, out)
    if arguments.plant is not None:
        return plant(arguments.plant, seed)
    if arguments.against:
        return against(available(arguments.names or MODELS), seed, arguments.json)
    wanted = arguments.names or [*LAYERS, *MODELS]
    names = available(wanted)
    if skipped := [name for name in wanted if name not in names]:
        print(f'skipped, for want of SciPy (pip install "minivit[interop]"): {", ".join(skipped)}')
    if arguments.depth:
        passed, report = True, {name: depth(name, seed, out) for name in names}
    elif arguments.all:
        passed, report = everything(names, seed)
    else:
        passed, report = elements(names, arguments)
    if arguments.json:
        write_json(arguments.json, report)
    return 0 if passed else 1
