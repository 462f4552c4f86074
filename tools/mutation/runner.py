"""Mutants at work: each in a process of its own, and the checks that run its code, until one notices.

The checks of a mutant are the gradient checks, the exact facts and the tests that call the changed function on the
unchanged code, the sharpest and quickest first.
"""

import itertools
import json
import os
import resource
import selectors
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tqdm import tqdm

from minivit import InputError
from mutation.units import Mutant, all_units

# tests that are the gradient checks over again, or check whole models element by element
TOO_SLOW = "element_by_element"
BROKEN = 70  # exit status of a child that could not run its checks
KINDS = ("gradient", "fact", "test")


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
    """Raise if a case of `minivit.laboratory.cases.LAYERS` has a wrong gradient."""
    from minivit.laboratory import gradcheck
    from minivit.laboratory.cases import LAYERS

    forward, backward, args, names = LAYERS[name](np.random.default_rng(0))
    for result in gradcheck.check(forward, backward, args, names=names, method="complex", elementwise=True):
        assert result.passed, result


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
        functions = [u for u in all_units() if u.is_function]
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
            for check, following in itertools.zip_longest(checks, checks[1:]):
                if problem := self.perform(check, following):
                    return f"{check.kind} {check.name} fails after the others, without any change: {problem}"
            return ""

        ends = []
        self.in_children([(0, work)], 600, lambda _, problem, status: ends.append((problem, status)))
        (problem, status) = ends[0]
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
