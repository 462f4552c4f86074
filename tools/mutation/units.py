"""What is mutated, and its mutants: every function that computes a derivative or an update, changed in one place."""

from __future__ import annotations

import ast
import difflib
import functools
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

from mutation.operators import GENERIC, OPERATORS

ROOT = Path(__file__).resolve().parent.parent.parent


class Unit(NamedTuple):
    """What is mutated as a whole: a function, a method, or an assignment at the top of a module or class."""

    file: str  # relative to the repository, as minivit/optim/adam.py
    function: str  # learning_rate, Adam.update, AdamW.decoupled, PIECE
    line: int  # where it starts
    source: str  # its text, not indented
    is_function: bool

    @property
    def module(self):
        return self.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Mutant(NamedTuple):
    """One change of one unit."""

    unit: Unit
    operator: str
    line: int  # in the file
    original: str  # the lines that change, in one
    mutated: str  # what they become
    source: str  # the whole unit, changed

    @property
    def key(self):
        return self.unit.file, self.unit.function, self.original, self.mutated

    def diff(self):
        """The change as a unified diff of the unit."""
        before, after, file = self.unit.source.splitlines(), self.source.splitlines(), self.unit.file
        return "\n".join(difflib.unified_diff(before, after, file, f"{file} ({self.operator})", lineterm="", n=2))


def _assigned(statement):
    """The one name that a simple assignment statement defines, or None."""
    node = statement.children[0] if statement.type == "simple_stmt" else statement
    if node.type == "expr_stmt" and node.children[0].type == "name" and node.children[1] == "=":
        return node.children[0].value
    return None


def _is_derivative(unit):
    """Does a function compute derivatives, by its name, or make a function that does?"""
    last = unit.function.rpartition(".")[2]
    return "backward" in last or "gradient" in last or re.search(r"^ +def \w*backward\(", unit.source, re.MULTILINE)


def _with_helpers(units, names):
    """The units of these names and the functions of their file that they call, at any depth."""
    chosen, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        chosen.add(name)
        called = {n.id for n in ast.walk(ast.parse(units[name].source)) if isinstance(n, ast.Name)}
        waiting += [n for n in called if n in units and n not in chosen and units[n].is_function]
    return {name: unit for name, unit in units.items() if name in chosen}


def units_of(path, *, root=ROOT):
    """Every unit of a file, {name: Unit}."""
    path = Path(path).resolve()
    file = path.relative_to(root).as_posix()
    tree = parso.parse(path.read_text(encoding="utf-8"))
    units = {}

    def visit(children, owner):
        for node in children:
            if node.type == "decorated":
                node = node.children[-1]
            name = node.name.value if node.type in ("funcdef", "classdef") else _assigned(node)
            if node.type == "classdef":
                visit(node.children[-1].children, f"{name}.")
            elif name and name != "__all__":
                source = textwrap.dedent(" " * node.start_pos[1] + node.get_code(include_prefix=False))
                units[owner + name] = Unit(file, owner + name, node.start_pos[0], source, node.type == "funcdef")

    visit(tree.children, "")
    return units


# What is mutated, by files of minivit/: the functions that compute derivatives, with their helpers; files as a whole;
# and single functions. The tokens of options/axial.py only move, forward and back: it has no other backward.
DERIVATIVES = (
    "layers/*.py", "options/**/*.py", "model/vit.py",
    "masked/corrupt.py", "masked/gather.py", "masked/loss.py", "masked/model.py",
)  # fmt: skip
WHOLE = (
    "base/pairs.py", "layers/loss.py", "kernels/cpu.py", "options/axial.py", "optim/*.py",
    "training/step.py", "training/engines/cpu.py", "training/engines/cut.py",
)  # fmt: skip
SINGLE = {"base/backend.py": ("matmul", "matmul_rows", "column_sum")}


@functools.cache  # the files are parsed once
def all_units(root=ROOT):
    """Every unit that is mutated, by files: layers, options, models, twins, loss, optimisers, engine, products."""
    package, chosen = root / "minivit", {}
    for pattern in DERIVATIVES:
        for path in package.glob(pattern):
            units = units_of(path, root=root)
            chosen[path] = _with_helpers(units, [name for name, unit in units.items() if _is_derivative(unit)])
    for pattern in WHOLE:
        chosen |= {path: units_of(path, root=root) for path in package.glob(pattern)}
    for file, names in SINGLE.items():
        units = units_of(package / file, root=root)
        chosen[package / file] = {name: units[name] for name in names}
    return tuple(unit for path in sorted(chosen) for unit in chosen[path].values())


def _signatures(tree):
    """Parameters of every function in a tree, without the defaults."""
    return [[a.arg for a in ast.walk(n.args) if isinstance(a, ast.arg)] + [len(n.args.posonlyargs), len(n.args.args)]
            for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]  # fmt: skip


def _is_message(node):
    """Is the node part of an error message, a documentation string or an annotation?"""
    while node is not None:
        if node.type in ("raise_stmt", "fstring", "tfpdef", "annassign"):
            return True
        node = node.parent
    return False


def _one_line(lines):
    """Lines of code as one, without comments."""
    return " ".join(" ".join(re.sub(r"(^|  )#.*", "", line) for line in lines).split())


def mutants_of(unit):
    """All mutants of a unit, each different from the original and from one another, in the order of its lines."""
    original = ast.parse(unit.source)
    programs, mutants = {ast.dump(original)}, []
    before = unit.source.splitlines()
    generic = OperatorProvider()
    for name in (*GENERIC, *OPERATORS):
        operator = (OPERATORS[name] if name in OPERATORS else generic[name])()
        positions = [(n, p) for n in ast_nodes(get_ast(unit.source)) for p in operator.mutation_positions(n)]
        for occurrence, (node, (start, _)) in enumerate(positions):
            if _is_message(node) and not (name == "DropStatement" and node.type == "raise_stmt"):
                continue
            source = mutate_code(unit.source, operator, occurrence)
            try:
                tree = ast.parse(source)
            except SyntaxError:  # the text is no program: nothing to test
                continue
            dump = ast.dump(tree)
            if dump in programs or _signatures(tree) != _signatures(original):
                continue
            programs.add(dump)
            after = source.splitlines()
            matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
            changed = [c for c in matcher.get_opcodes() if c[0] != "equal"]
            i1, i2, j1, j2 = changed[0][1], changed[-1][2], changed[0][3], changed[-1][4]
            old, new = _one_line(before[i1:i2]), _one_line(after[j1:j2])
            mutants.append(Mutant(unit, name, unit.line + start[0] - 1, old, new, source))
    return sorted(mutants, key=lambda m: m.line)
