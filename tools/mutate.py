"""Mutation score: break every gradient, the loss, the optimisers and the engine line by line; does a check notice?

Each mutant is one small change of one line: a sign, an operator, an operand, a transpose, an axis, a dropped term, a
constant, an off-by-one. The checks that run the changed function are tried on it, the sharpest and quickest first: its
gradient checks (complex step, element by element), the exact facts, the tests. A mutant that none of them
notices survives: a line that nothing tests, or a change without effect, which is then listed with its reason in
tests/equivalent_mutants.toml.
"""

import importlib
import os
import platform
import sys
import time
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "2"  # so that limiting it to 1 can be seen, on any machine

import numpy as np
from tqdm import tqdm

from minivit import InputError
from minivit.base.files import write_json
from minivit.commands.cli import Parser, output_file, run
from minivit.training.engines.cut import available_cores

try:
    from mutation.runner import KINDS, run_mutants
    from mutation.units import ROOT, all_units, mutants_of
except ImportError as error:
    print(f'error: mutation testing needs {error.name}: pip install "minivit[mutation]"', file=sys.stderr)
    sys.exit(2)

EQUIVALENT = ROOT / "tests" / "equivalent_mutants.toml"
TESTS = (
    "base/test_pairs.py", "layers", "options", "optim", "model/test_model.py", "model/test_reference.py",
    "masked/test_masked.py",
    "laboratory/test_facts.py", "laboratory/test_trace.py", "training/test_engine_cpu.py", "training/test_step.py",
    "training/test_plan.py", "training/test_loop.py", "evaluation/test_inference.py",
)  # fmt: skip
COLUMNS = ("mutants", *KINDS, "invalid", "timeout", "equivalent", "survived")

EXAMPLES = """
examples:
  python tools/mutate.py                                everything: some 11,000 mutants
  python tools/mutate.py layernorm_backward Adam.update two functions
  python tools/mutate.py minivit/optim --list           the mutants of a folder or a file, numbered
  python tools/mutate.py minivit/optim --show 17        one of them as a diff
  python tools/mutate.py --limit 100 --sample 0         a random hundred
  python tools/mutate.py --json benchmarks/mutation.json   the table as a file, and beside it as .md

The exit status is 0 if every mutant that is not listed as equivalent is noticed, 1 if one survives (or one that is
listed as equivalent is noticed), 2 for bad input.
"""


def choose(names):
    """The units that paths or function names mean; all without any.

    Raises  InputError: nothing is called so.
    """
    units = all_units()
    if not names:
        return units
    chosen = []
    for name in names:
        path = Path(name).resolve()
        named = [u for u in units if name in (u.function, u.function.rpartition(".")[0])] or [
            u for u in units if ROOT / u.file == path or path in (ROOT / u.file).parents
        ]
        if not named:
            raise InputError(
                f"no function or file to mutate is called {name!r}: give names such as linear_backward, Adam.update or "
                "minivit/optim (--list shows what there is)"
            )
        chosen += [u for u in named if u not in chosen]
    return chosen


def read_equivalent(path, units, mutants):
    """{mutant key: reason} from the list of mutants that change no result.

    Raises  InputError: a file that cannot be read, an entry that lacks something, one that no mutant matches any more.
    """
    try:
        entries = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("equivalent", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}") from None
    known = {(u.file, u.function) for u in all_units()}
    chosen, keys, reasons = {(u.file, u.function) for u in units}, {m.key for m in mutants}, {}
    for entry in entries:
        if set(entry) != {"file", "function", "line", "mutants", "reason"}:
            raise InputError(f"{path}: an entry needs file, function, line, mutants and reason, it has {sorted(entry)}")
        place = (entry["file"], entry["function"])
        for mutated in entry["mutants"]:
            key = (*place, entry["line"], mutated)
            if place not in known or (place in chosen and key not in keys):
                raise InputError(
                    f"{path}: no mutant of {place[0]} {place[1]} makes {mutated!r} of {entry['line']!r} any more; "
                    "delete the entry or correct it"
                )
            reasons[key] = entry["reason"]
    return reasons


def rows_of(units, mutants, outcomes, reasons):
    """The table: one dict per unit, in the order of the files."""
    rows = {(u.file, u.function): dict.fromkeys(COLUMNS, 0) for u in units}
    for i, mutant in enumerate(mutants):
        row = rows[mutant.key[:2]]
        result = outcomes[i].result
        row["mutants"] += 1
        row["equivalent" if result == "survived" and mutant.key in reasons else result] += 1
    return [{"file": file, "function": function, **row} for (file, function), row in rows.items() if row["mutants"]]


def total_of(rows):
    """The sum of some rows."""
    return {column: sum(row[column] for row in rows) for column in COLUMNS}


def print_table(rows):
    """The table in the terminal."""
    print(f"{'':34}{'':8}{'killed by':>15}")
    print(f"{'':34}{'mutants':>8}{'gradient':>10}{'fact':>6}{'test':>6}{'invalid':>9}{'timeout':>9}{'equivalent':>12}"
          f"{'SURVIVED':>10}")  # fmt: skip
    widths = dict(zip(COLUMNS, (8, 10, 6, 6, 9, 9, 12, 10), strict=True))
    for i, row in enumerate([*rows, {"file": "", "function": "total", **total_of(rows)}]):
        if i == 0 or row["file"] != rows[min(i, len(rows)) - 1]["file"] or i == len(rows):
            print(row["file"])
        print(f"  {row['function']:32}" + "".join(f"{row[c]:{widths[c]}d}" for c in COLUMNS))


def markdown(report):
    """The report as a Markdown page."""
    total = report["total"]
    lines = [
        "# Mutation score",
        "",
        f"`{report['command']}`: {total['mutants']:,} mutants, {report['killed']:,} killed, {total['equivalent']} "
        f"equivalent (each with its reason in `tests/equivalent_mutants.toml`), **{total['survived']} survived**.",
        f"{report['wall_seconds']:.0f} s on {report['workers']} workers; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "",
        "A mutant is killed by the first check that notices it, in the order gradient check (complex step, element by",
        "element), exact fact, test. *Invalid* ones cannot be imported; *timeout*: a check did not end.",
        "",
        "| function | mutants | by gradient | by fact | by test | invalid | timeout | equivalent | survived |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for file in dict.fromkeys(row["file"] for row in report["functions"]):
        rows = [row for row in report["functions"] if row["file"] == file]
        for name, row in ((f"**{file}**", total_of(rows)), *((f"`{r['function']}`", r) for r in rows)):
            lines.append(f"| {name} | " + " | ".join(str(row[c]) for c in COLUMNS) + " |")
    lines.append("| **total** | " + " | ".join(f"**{total[c]}**" for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def versions():
    """What the figures were taken with."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("numpy", "pytest", "cosmic-ray", "parso")
    }


def parse(argv):
    """The command line as a namespace, its ``tests`` as paths.

    Raises  InputError: numbers out of range, tests that are not there, a system without os.fork.
    """
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="mutate.py")
    parser.add_argument("names", nargs="*", metavar="NAME", help="files, folders or functions to mutate [all]")
    parser.add_argument("--workers", type=int, metavar="N", help="mutants tried at a time [one per processor core]")
    parser.add_argument("--list", action="store_true", help="print the mutants, numbered, and try none")
    parser.add_argument("--show", type=int, metavar="N", help="print the diff of the mutant with that number")
    parser.add_argument("--limit", type=int, metavar="N", help="try only the first N")
    parser.add_argument("--sample", type=int, metavar="SEED", help="with --limit: N at random")
    parser.add_argument("--timeout", type=int, default=30, metavar="S", help="seconds that a check may take [30]")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="tests to run instead of the project's fast ones")
    parser.add_argument("--only-tests", action="store_true", help="no gradient checks and facts, only tests")
    parser.add_argument("--equivalent", default=str(EQUIVALENT), metavar="FILE",
                        help="the mutants that change no result [tests/equivalent_mutants.toml]")  # fmt: skip
    parser.add_argument("--json", type=output_file, metavar="FILE",
                        help="write the figures as JSON, and beside it a table as .md")  # fmt: skip
    arguments = parser.parse_args(argv)
    for name in ("workers", "limit", "timeout"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.sample is not None and (arguments.limit is None or arguments.sample < 0):
        raise InputError("--sample takes a seed of at least 0, and needs --limit: how many mutants to draw")
    arguments.tests = [Path(t) for t in arguments.tests or [ROOT / "tests" / t for t in TESTS]]
    for path in arguments.tests:
        if not Path(str(path).partition("::")[0]).exists():
            raise InputError(f"there are no tests at {path}")
    if not hasattr(os, "fork"):
        raise InputError("mutation testing needs os.fork, which Windows does not have; use Linux, macOS or WSL")
    return arguments


def numbers_of(mutants, arguments):
    """The numbers of the mutants that --limit and --sample choose."""
    if arguments.sample is None:
        return list(range(len(mutants)))[: arguments.limit]
    count = min(arguments.limit, len(mutants))
    return sorted(np.random.default_rng(arguments.sample).choice(len(mutants), count, replace=False).tolist())


def disagreements(mutants, numbers, outcomes, reasons):
    """(the survivors that are not listed as equivalent, the mutants that are listed and noticed), ready for JSON."""
    survivors, disproved = [], []
    for i, number in enumerate(numbers):
        mutant, listed, outcome = mutants[number], mutants[number].key in reasons, outcomes[i]
        entry = {"number": number, "file": mutant.unit.file, "line": mutant.line, "function": mutant.unit.function,
                 "operator": mutant.operator, "original": mutant.original, "mutated": mutant.mutated}  # fmt: skip
        if outcome.result == "survived" and not listed:
            survivors.append(entry)
        elif outcome.result != "survived" and listed:
            disproved.append(entry | {"check": outcome.check})
    for word, entries in (("SURVIVED", survivors), ("listed as equivalent, but noticed", disproved)):
        for e in entries:
            print(f"{word}: {e['number']} {e['file']}:{e['line']} {e['function']} {e['operator']} {e.get('check', '')}")
            print(f"  - {e['original']}\n  + {e['mutated']}")
    return survivors, disproved


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments, started = parse(argv), time.perf_counter()
    units = choose(arguments.names)
    mutants = [m for unit in tqdm(units, unit="function", disable=None, leave=False) for m in mutants_of(unit)]
    reasons = read_equivalent(arguments.equivalent, units, mutants)
    if arguments.show is not None:
        if not 0 <= arguments.show < len(mutants):
            raise InputError(f"--show must be a number from 0 to {len(mutants) - 1}, got {arguments.show}")
        print(mutants[arguments.show].diff())
        return 0
    numbers = numbers_of(mutants, arguments)
    chosen = [mutants[number] for number in numbers]
    if arguments.list:
        for number, m in zip(numbers, chosen, strict=True):
            print(f"{number:5d} {m.unit.file}:{m.line} {m.unit.function} {m.operator}")
            print(f"      - {m.original}\n      + {m.mutated}")
        return 0

    for module in {u.module for u in all_units()}:
        importlib.import_module(module)
    workers = arguments.workers or available_cores()
    outcomes = run_mutants(
        chosen, tests=arguments.tests, workers=workers, timeout=arguments.timeout, only_tests=arguments.only_tests
    )
    rows = rows_of(units, chosen, outcomes, reasons)
    total, wall = total_of(rows), time.perf_counter() - started
    killed = total["mutants"] - total["equivalent"] - total["survived"]
    print_table(rows)
    print(f"{total['mutants']} mutants in {wall:.0f} s on {workers} workers: {killed} killed, {total['equivalent']} "
          f"equivalent, {total['survived']} survived")  # fmt: skip
    survivors, disproved = disagreements(mutants, numbers, outcomes, reasons)
    if arguments.json:
        words = sys.argv[1:] if argv is None else argv
        report = {
            "command": " ".join(["python", "tools/mutate.py", *words]),
            "total": total,
            "killed": killed,
            "wall_seconds": round(wall, 1),
            "workers": workers,
            "versions": versions(),
            "operators": dict(Counter(m.operator for m in chosen).most_common()),
            "functions": rows,
            "survivors": survivors,
            "noticed_though_listed": disproved,
        }
        write_json(arguments.json, report)
        Path(arguments.json).with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    return 1 if survivors or disproved else 0


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
