"""Mutation score: break every gradient, the loss, the optimisers and the engine line by line; does a check notice?

Each mutant is one small change of one line: a sign, an operator, an operand, a transpose, an axis, a dropped term, a
constant, an off-by-one. The checks that run the changed function are tried on it, the sharpest and quickest first: its
gradient checks (complex step element by element, adjoint test), the exact facts, the tests. A mutant that none of them
notices survives: a line that nothing tests, or a change without effect, which is then listed with its reason in
tests/equivalent_mutants.toml.
"""

import importlib
import json
import os
import platform
import resource
import selectors
import signal
import sys
import threading
import time
import tomllib
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "2"  # so that limiting it to 1 can be seen, on any machine

import numpy as np
from tqdm import tqdm

from minivit import InputError
from minivit.commands.cli import Parser, output_file, run
from minivit.training.engine import available_cores

try:
    import pytest
    from mutants import Mutant, all_units, mutants_of
except ImportError as error:
    print(f'error: mutation testing needs {error.name}: pip install "minivit[mutation]"', file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.toml"
TESTS = (
    "layers", "options", "optim", "model/test_model.py", "model/test_reference.py", "masked/test_masked.py",
    "laboratory/test_facts.py", "training/test_engine.py",
    "training/test_train.py::test_sam_goes_as_far_uphill_as_asked_for_and_comes_back",
)  # fmt: skip
# the gradient checks here are the same, and of whole models the adjoint test says as much in a hundredth of the time
TOO_SLOW = "element_by_element"
BROKEN = 70  # exit status of a child that could not run its checks
KINDS = ("gradient", "fact", "test")
COLUMNS = ("mutants", *KINDS, "invalid", "timeout", "equivalent", "survived")

EXAMPLES = """
examples:
  python tools/mutate.py                                everything: some 4000 mutants
  python tools/mutate.py layernorm_backward Adam.step   two functions
  python tools/mutate.py minivit/optim --list           the mutants of a folder or a file, numbered
  python tools/mutate.py minivit/optim --show 17        one of them as a diff
  python tools/mutate.py --limit 100 --sample 0         a random hundred
  python tools/mutate.py --json benchmarks/mutation.json   the table as a file, and beside it as .md

The exit status is 0 if every mutant that is not listed as equivalent is noticed, 1 if one survives (or one that is
listed as equivalent is noticed), 2 for bad input.
"""


class Check(NamedTuple):
    """Something that fails when the code is wrong."""

    kind: str  # gradient, fact or test
    name: str
    call: object  # () -> None, raises; or a pytest item


class Outcome(NamedTuple):
    """What became of a mutant."""

    result: str  # gradient, fact, test: who noticed; invalid, timeout, survived
    check: str = ""


def gradient_check(name):
    """Raise if a case of `gradcheck_cases.LAYERS` has a wrong gradient or forward-mode derivative."""
    from minivit.laboratory import gradcheck
    from minivit.laboratory.cases import JVPS, LAYERS

    forward, backward, args, names = LAYERS[name](np.random.default_rng(0))
    for result in gradcheck.check(forward, backward, args, names=names, method="complex", elementwise=True):
        assert result.passed, result
    error = gradcheck.adjoint_error(forward, backward, JVPS[name.partition("-")[0]], args)
    assert error < 1e-13, error


def fact_check(name):
    """Raise if one of `facts.FACTS` does not hold."""
    from minivit.laboratory.facts import FACTS, TOLERANCE

    error = FACTS[name]()
    assert error <= TOLERANCE, error


def direct_checks():
    """Gradient checks and facts."""
    from minivit.laboratory.cases import LAYERS
    from minivit.laboratory.facts import FACTS

    return [Check("gradient", name, lambda name=name: gradient_check(name)) for name in LAYERS] + [
        Check("fact", name, lambda name=name: fact_check(name)) for name in FACTS
    ]


def function_of(unit):
    """The function object of a unit, without decorators."""
    thing = sys.modules[unit.module]
    for name in unit.function.split("."):
        thing = getattr(thing, name)
    return getattr(thing, "__wrapped__", thing)


def apply(mutant):
    """Put a mutant in the place of the original, in this process, for good.

    The code of the function object itself is exchanged: whoever holds the function, a module that imported it, a table
    or a closure, calls the mutant.
    """
    unit = mutant.unit
    module = sys.modules[unit.module]
    local = {}
    exec(compile(mutant.source, unit.file, "exec"), module.__dict__, local)
    changed = next(iter(local.values()), None)
    if unit.is_function:
        function = function_of(unit)
        function.__code__, function.__defaults__ = changed.__code__, changed.__defaults__
        function.__kwdefaults__ = changed.__kwdefaults__
        return
    path, _, name = unit.function.rpartition(".")
    old = vars(getattr(module, path) if path else module)[name]
    holders = [getattr(module, path)] if path else [
        m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(name) is old
    ]  # fmt: skip
    for holder in holders:
        if local:
            setattr(holder, name, changed)
        else:  # the statement was left out
            delattr(holder, name)


def code_objects(code):
    """A code object and those of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from code_objects(constant)


class Plugin:
    """The pytest plugin that does the work: once the tests are collected and imported, each mutant is a fork."""

    def __init__(self, mutants, *, workers, timeout, only_tests):
        self.mutants, self.workers, self.timeout, self.only_tests = mutants, workers, timeout, only_tests
        self.failure = None  # of the test that ran last
        self.error, self.crash, self.collect_errors = None, None, ()
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        """Keep the failure of a test, its fixtures included."""
        if report.failed:
            self.failure = str(report.longrepr)

    def pytest_runtestloop(self, session):
        """Instead of running the tests: measure them, then run them on the mutants."""
        if session.testsfailed:
            self.error = "the tests cannot be collected: " + "; ".join(map(str, self.collect_errors))
            return True
        checks = [] if self.only_tests else direct_checks()
        self.checks = checks + [Check("test", item.nodeid, item) for item in session.items]
        if not self.checks:
            self.error = "there is no test to run in --tests"
            return True
        try:
            self.calls, self.seconds = self.baseline()
            self.control()
            self.test_mutants()
        except Exception as problem:  # pytest would print it; `run_mutants` raises it
            self.crash = problem
        return True

    def pytest_collectreport(self, report):
        """Remember a test file that cannot be imported."""
        if report.failed:
            self.collect_errors = (*self.collect_errors, str(report.longrepr).splitlines()[-1])

    def perform(self, check, following=None):
        """Run one check; the reason if it fails, else None."""
        if check.kind != "test":
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    check.call()
            except Exception as problem:
                return f"{type(problem).__name__}: {problem}"
            return None
        self.failure = None
        nextitem = following.call if following is not None and following.kind == "test" else None
        check.call.ihook.pytest_runtest_protocol(item=check.call, nextitem=nextitem)
        return self.failure

    def fork(self, work, deadline_each):
        """Run ``work()`` in a child process; returns (pid, the pipe that its result comes through, as JSON)."""
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of threads, and BLAS takes care of its own
            pid = os.fork()
        if pid:
            os.close(writing)
            return pid, reading
        try:
            os.close(reading)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            if os.path.exists("/proc/self/statm"):  # a mutant may ask for an array of any size
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever its threads do
            signal.alarm(deadline_each)
            text = json.dumps(work())
            with os.fdopen(writing, "w") as pipe:
                pipe.write(text)
            os._exit(0)
        finally:
            os._exit(BROKEN)

    def in_children(self, tasks, deadline, done):
        """Run tasks, (key, work) pairs, in as many processes as there are workers; ``done(key, result, status)``."""
        tasks, selector = iter(tasks), selectors.DefaultSelector()
        running, received = 0, {}
        try:
            while True:
                while running < self.workers:
                    task = next(tasks, None)
                    if task is None:
                        break
                    key, work = task
                    pid, reading = self.fork(work, deadline)
                    received[reading] = b""
                    selector.register(reading, selectors.EVENT_READ, (key, pid))
                    running += 1
                if not running:
                    return
                for event, _ in selector.select():
                    reading, (key, pid) = event.fd, event.data
                    part = os.read(reading, 65536)
                    if part:
                        received[reading] += part
                        continue
                    selector.unregister(reading)
                    os.close(reading)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    running -= 1
                    text = received.pop(reading)
                    done(key, json.loads(text) if text else None, status)
        finally:
            for entry in list(selector.get_map().values()):
                os.kill(entry.data[1], signal.SIGKILL)
                os.waitpid(entry.data[1], 0)

    def baseline(self):
        """Run every check on the unchanged code: which of the functions does it call, and how long does it take?

        Raises  InputError: one fails.
        """
        functions = [u for u in all_units(ROOT) if u.is_function]
        owner = {c: f"{u.file}:{u.function}" for u in functions for c in code_objects(function_of(u).__code__)}

        def work(part):
            def run_part():
                results = []
                for i, check in enumerate(part):
                    called = set()

                    def note(frame, event, _, called=called):
                        if event == "call" and frame.f_code in owner:
                            called.add(owner[frame.f_code])

                    signal.alarm(0)
                    threading.setprofile(note)
                    sys.setprofile(note)
                    started = time.perf_counter()
                    problem = self.perform(check, part[i + 1] if i + 1 < len(part) else None)
                    seconds = time.perf_counter() - started
                    sys.setprofile(None)
                    threading.setprofile(None)
                    results.append([check.kind, check.name, sorted(called), seconds, problem])
                return results

            return run_part

        calls, seconds, problems = {}, {}, []

        def done(key, results, status):
            if results is None:
                problems.append(f"the checks end the process (status {status}) before anything is changed")
            for kind, name, called, took, problem in results or ():
                calls[kind, name], seconds[kind, name] = set(called), took
                if problem:
                    problems.append(f"{kind} {name} fails before anything is changed: {problem}")

        parts = [self.checks[i :: self.workers] for i in range(self.workers)]
        self.in_children(((i, work(part)) for i, part in enumerate(parts)), 600, done)
        if problems:
            raise InputError(problems[0][:600])
        return calls, seconds

    def control(self):
        """Exchange every function for an unchanged copy and run the checks in the order the mutants get them.

        Raises  InputError: one fails, so that it would kill mutants that it does not notice.
        """
        units = list(dict.fromkeys(m.unit for m in self.mutants))
        names = {c[:2] for unit in units for c in self.relevant(unit)}
        checks = self.in_order(c for c in self.checks if c[:2] in names)

        def work():
            signal.alarm(0)
            for unit in units:
                apply(Mutant(unit, "", unit.line, "", "", unit.source))
            for check, following in zip(checks, [*checks[1:], None], strict=True):
                if problem := self.perform(check, following):
                    return f"{check.kind} {check.name} fails after the others, without any change: {problem}"
            return ""

        found = []
        self.in_children([(0, work)], 600, lambda _, problem, status: found.append((problem, status)))
        (problem, status) = found[0]
        if problem is None:
            raise InputError(f"the checks end the process (status {status}) before anything is changed")
        if problem:
            raise InputError(problem[:600])

    def in_order(self, checks):
        """Checks, the sharpest and quickest first."""
        return sorted(checks, key=lambda c: (KINDS.index(c.kind), self.seconds[c[:2]]))

    def relevant(self, unit):
        """The checks that run a unit's code (for a constant: any of its module), in order."""
        prefix = f"{unit.file}:"
        if unit.is_function:
            chosen = [c for c in self.checks if prefix + unit.function in self.calls[c[:2]]]
        else:
            chosen = [c for c in self.checks if any(name.startswith(prefix) for name in self.calls[c[:2]])]
        return self.in_order(chosen)

    def try_on(self, mutant):
        """In a child: apply a mutant and run the checks until one fails."""

        def work():
            try:
                apply(mutant)
            except Exception as problem:
                return ["invalid", f"{type(problem).__name__}: {problem}"]
            checks = self.relevant(mutant.unit)
            for i, check in enumerate(checks):
                signal.alarm(self.timeout)
                if self.perform(check, checks[i + 1] if i + 1 < len(checks) else None):
                    return [check.kind, check.name]
            return ["survived", ""]

        return work

    def test_mutants(self):
        """Every mutant in its own process, with a bar."""
        tqdm.monitor_interval = 0  # no thread of its own: there will be forks
        tally = Counter()
        with tqdm(total=len(self.mutants), unit="mutant", disable=None) as bar:

            def done(number, result, status):
                if result is None and status >= 0:  # not the mutant's doing
                    raise RuntimeError(f"the checks of mutant {number} cannot be run (status {status})")
                if result is None:  # a signal ended the process: the alarm, or a crash
                    result = ["timeout", "a check took too long"] if status == -signal.SIGALRM else ["test", "a crash"]
                self.outcomes[number] = Outcome(*result)
                tally[result[0]] += 1
                bar.set_postfix(survived=tally["survived"])
                bar.update()

            self.in_children(((i, self.try_on(m)) for i, m in enumerate(self.mutants)), self.timeout, done)


def choose(names):
    """The units that paths or function names mean; all without any.

    Raises  InputError: nothing is called so.
    """
    units = all_units(ROOT)
    if not names:
        return units
    chosen = []
    for name in names:
        path = Path(name).resolve()
        found = [u for u in units if name in (u.function, u.function.rpartition(".")[0])] or [
            u for u in units if ROOT / u.file == path or path in (ROOT / u.file).parents
        ]
        if not found:
            raise InputError(
                f"no function or file to mutate is called {name!r}: give names such as linear_backward, Adam.step or "
                "minivit/optim (--list shows what there is)"
            )
        chosen += [u for u in found if u not in chosen]
    return chosen


def read_equivalent(path, units, mutants):
    """{mutant key: reason} from the list of mutants that change no result.

    Raises  InputError: a file that cannot be read, an entry that lacks something, one that no mutant matches any more.
    """
    try:
        entries = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("equivalent", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}") from None
    known = {(u.file, u.function) for u in all_units(ROOT)}
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
        "A mutant is killed by the first check that notices it, in the order gradient check (complex step element by",
        "element, adjoint test), exact fact, test. *Invalid* ones cannot be imported; *timeout*: a check did not end.",
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


def run_mutants(mutants, *, tests, workers, timeout, only_tests):
    """{index: Outcome} of each mutant.

    Raises  InputError: a check fails on the unchanged code, or there is no test.
    """
    plugin = Plugin(mutants, workers=workers, timeout=timeout, only_tests=only_tests)
    arguments = ["-p", "no:cacheprovider", "-qq", "-s", "--no-header", "--no-summary", "-k", f"not ({TOO_SLOW})"]
    here = os.open(os.devnull, os.O_WRONLY)
    shown = os.dup(1)
    sys.stdout.flush()
    os.dup2(here, 1)  # pytest's own words about a session without tests
    try:
        status = pytest.main([*arguments, *map(str, tests)], plugins=[plugin])
        sys.stdout.flush()
    finally:
        os.dup2(shown, 1)
        os.close(here)
        os.close(shown)
    if plugin.crash:
        raise plugin.crash
    if plugin.error or len(plugin.outcomes) < len(mutants):
        if status == pytest.ExitCode.INTERRUPTED and not plugin.error and not plugin.collect_errors:
            raise KeyboardInterrupt
        raise InputError(plugin.error or "; ".join(plugin.collect_errors) or f"pytest cannot run (status {status})")
    return plugin.outcomes


def main(argv=None):
    """Entry point; returns the exit status."""
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
    tests = [Path(t) for t in arguments.tests] if arguments.tests else [ROOT / "tests" / t for t in TESTS]
    for path in tests:
        if not Path(str(path).partition("::")[0]).exists():
            raise InputError(f"there are no tests at {path}")
    if not hasattr(os, "fork"):
        raise InputError("mutation testing needs os.fork, which Windows does not have; use Linux, macOS or WSL")

    started = time.perf_counter()
    units = choose(arguments.names)
    mutants = [m for unit in tqdm(units, unit="function", disable=None, leave=False) for m in mutants_of(unit)]
    reasons = read_equivalent(arguments.equivalent, units, mutants)
    numbers = range(len(mutants))
    if arguments.show is not None:
        if not 0 <= arguments.show < len(mutants):
            raise InputError(f"--show must be a number from 0 to {len(mutants) - 1}, got {arguments.show}")
        print(mutants[arguments.show].diff())
        return 0
    if arguments.sample is not None:
        count = min(arguments.limit, len(mutants))
        numbers = sorted(np.random.default_rng(arguments.sample).choice(len(mutants), count, replace=False).tolist())
    numbers = list(numbers)[: arguments.limit]
    if arguments.list:
        for i in numbers:
            m = mutants[i]
            print(f"{i:5d} {m.unit.file}:{m.line} {m.unit.function} {m.operator}")
            print(f"      - {m.original}\n      + {m.mutated}")
        return 0

    mutants = [mutants[i] for i in numbers]
    for module in {u.module for u in all_units(ROOT)}:
        importlib.import_module(module)
    workers = arguments.workers or available_cores()
    outcomes = run_mutants(
        mutants, tests=tests, workers=workers, timeout=arguments.timeout, only_tests=arguments.only_tests
    )
    rows = rows_of(units, mutants, outcomes, reasons)
    total, wall = total_of(rows), time.perf_counter() - started
    killed = total["mutants"] - total["equivalent"] - total["survived"]
    print_table(rows)
    print(f"{total['mutants']} mutants in {wall:.0f} s on {workers} workers: {killed} killed, {total['equivalent']} "
          f"equivalent, {total['survived']} survived")  # fmt: skip
    survivors, disproved = [], []
    for i, number in enumerate(numbers):
        mutant, listed = mutants[i], mutants[i].key in reasons
        entry = {"number": number, "file": mutant.unit.file, "line": mutant.line, "function": mutant.unit.function,
                 "operator": mutant.operator, "original": mutant.original, "mutated": mutant.mutated}  # fmt: skip
        if outcomes[i].result == "survived" and not listed:
            survivors.append(entry)
        elif outcomes[i].result != "survived" and listed:
            disproved.append(entry | {"check": outcomes[i].check})
    for word, entries in (("SURVIVED", survivors), ("listed as equivalent, but noticed", disproved)):
        for e in entries:
            print(f"{word}: {e['number']} {e['file']}:{e['line']} {e['function']} {e['operator']} {e.get('check', '')}")
            print(f"  - {e['original']}\n  + {e['mutated']}")
    if arguments.json:
        from minivit.training.trainer import write_json

        given = sys.argv[1:] if argv is None else argv
        report = {
            "command": " ".join(["python", "tools/mutate.py", *given]),
            "total": total,
            "killed": killed,
            "wall_seconds": round(wall, 1),
            "workers": workers,
            "versions": versions(),
            "operators": dict(Counter(m.operator for m in mutants).most_common()),
            "functions": rows,
            "survivors": survivors,
            "noticed_though_listed": disproved,
        }
        write_json(arguments.json, report)
        Path(arguments.json).with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    return 1 if survivors or disproved else 0


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
