"""Check every hand-written gradient, look into one of them, or plant a mistake and watch what exposes it."""

import dataclasses
import difflib
import random
import sys
from pathlib import Path

from minivit import InputError
from minivit.base.backend import find_device, use_device
from minivit.base.files import write_json
from minivit.base.finite import quiet_overflow
from minivit.commands.cli import Parser, output_file
from minivit.commands.gradient_tables import depth, table_of_elements, table_of_everything
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import LAYERS, MODELS
from minivit.laboratory.checks import LIMITS, available, expose, model_problem
from minivit.laboratory.facts import FACTS
from minivit.laboratory.hunt import LEVELS, changed_lines, hidden_at, level_of, names_file, names_function, names_line
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
  minivit gradcheck --plant random --level 1   one of the easier ones

The exit status is 0 if every gradient agrees (for --plant: if the mistake was exposed), 1 if not, 2 for bad input.
"""


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
            where = f"{mistake.module.removeprefix('minivit.')}.{mistake.function}"
            print(f"{mistake.name:34}level {level_of(mistake)}  {where}")
        print(f"{len(BY_NAME)} mistakes; --plant NAME shows what exposes one, --plant random hides one")
        for level, what in LEVELS.items():
            print(f"  --level {level}: {what}")
        return 0
    mistake = find(name)
    answer(mistake)
    findings = expose(mistake, seed)
    print("exposed by" if findings else "NOT EXPOSED")
    show(findings)
    return 0 if findings else 1


HUNT = """In which file, in which function, in which line? Type one after the other, or the function at once, or
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


def hunt(choice, seed, out, level=None):
    """Hide the mistake that the number ``choice`` draws and answer the reader's checks and guesses from stdin.

    The answer is shown after the right line and where it is asked for. Returns the exit status.
    """
    mistake = random.Random(choice).choice(hidden_at(level))
    findings = expose(mistake, seed)
    again = f"--plant random{f' --level {level}' if level else ''} --seed {choice}"
    print(f"One mistake is in the code ({again} hides the same again).")
    if level:
        print(f"Level {level}: {LEVELS[level]}.")
    if level in (None, 1):
        print("This is what the checks say of it:")
        show(findings)
    elif level == 2:
        cases = dict.fromkeys(line.split()[0] for line in findings)
        print(f"Checks fail in {', '.join(list(cases)[:12])}{', ...' if len(cases) > 12 else ''}.")
    print(HUNT)
    tally = dict.fromkeys(("guesses", "checks", "hints"), 0)
    changed = changed_lines(mistake)  # before it is planted: the source of what is planted is in no file
    with planted(mistake.name), quiet_overflow():
        ended = follow(mistake, changed, sys.stdin, tally, seed, out)
    if ended == "found":
        print("Found; " + ", ".join(f"{what}: {count}" for what, count in tally.items()) + ".")
    if ended in ("found", "answer"):
        answer(mistake)
    else:
        print(f"Not found. {again} hides the same again; there, type answer to see it.")
    return 0 if findings else 1


def follow(mistake, changed, lines, tally, seed, out):
    """Answer the lines that a hunter types; returns how it ended: "found", "answer", "quit", or "" at the last line."""
    function_found = False
    for line in lines:
        guess = line.strip().lower()
        if guess in ("quit", "answer"):
            return guess
        if guess == "hint":
            tally["hints"] += 1
            print(mistake.hint)
        elif not guess:
            continue
        elif function_found and names_line(changed, guess):
            tally["guesses"] += 1
            return "found"
        elif names_function(mistake, guess):
            function_found = True
            tally["guesses"] += 1
            print("Yes. In which line? Type its number in the file, or a part of it.")
        elif names_file(mistake, guess):
            tally["guesses"] += 1
            print("Yes, in that file. In which function?")
        elif investigate(guess.split(), seed, out):
            tally["checks"] += 1
        else:
            tally["guesses"] += 1
            print(f"Not {'that line' if function_found else f'in {guess}'}.")
    return ""


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
    parser.add_argument("--level", type=int, choices=tuple(LEVELS), help="how well --plant random hides [any mistake]")
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
            raise InputError(
                f"nothing called {name!r} to check; --help lists variants of {', '.join(plain)}; the case of a new "
                "layer is a line of BOOK in minivit/laboratory/cases.py, that of a new model one of MODELS"
            )
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
    if arguments.level and arguments.plant != "random":
        raise InputError("--level says how well --plant random hides: nothing is hidden without it")
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
        return hunt(random.randrange(10**6) if arguments.seed is None else seed, seed, out, arguments.level)
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
