"""The house of minivit: imports run downhill, packages offer the names they list, files and functions stay short.

A package may import itself and those before it in `ORDER`, inside functions too. What does not hold yet is in `KNOWN`,
which may only shrink: an entry that is no longer needed fails its test.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import minivit
import minivit.model

ORDER = (
    "base layers options model optim kernels weights data training masked evaluation laboratory figures paper "
    "benchmark lesson commands"
).split()
PACKAGE = ROOT / "minivit"
KNOWN = {
    "files": {
        "kernels/cuda.py",
        "laboratory/facts.py",
    },
}
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def hold(exceptions, kind):
    """Assert that the exceptions to a rule are those of `KNOWN`, no more and no fewer."""
    known = KNOWN.get(kind, set())
    assert not exceptions - known, "these break the rule: " + "; ".join(sorted(exceptions - known))
    assert not known - exceptions, f"no longer needed in KNOWN[{kind!r}]: " + "; ".join(sorted(known - exceptions))


# ---- imports run downhill --------------------------------------------------------------------------------------------

# package -> packages: names that may be written in one that comes earlier
BY_NAME = {("base", "kernels")}  # base.backend looks for the twins of a layer


def origins():
    """Where the names of ``minivit`` itself come from: {"ViT": "model", ...}."""
    imports = [node for node in TREES["__init__.py"].body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module.split(".")[1] for node in imports for alias in node.names}


def package_of(module, names=()):
    """The packages that ``from module import names`` reads."""
    parts = module.split(".")
    if parts[0] != "minivit":
        return set()
    if len(parts) > 1:
        return {parts[1]}
    return {origins().get(name, name) for name in names} & set(ORDER)


def references(tree):
    """The packages that a file imports, or names in a text that is the whole name of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from package_of(node.module, [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from package_of(alias.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"minivit(\.\w+)+\.?", node.value):  # of import_module, or the head of an f-string
                yield from package_of(node.value)


def test_imports_run_downhill():
    uphill = set()
    for file, tree in TREES.items():
        owner, *rest = file.split("/")
        if not rest:  # minivit/__init__.py, minivit/__main__.py
            continue
        assert owner in ORDER, f"{owner} has no place in the order of the packages"
        uphill |= {
            f"{file}: {package}"
            for package in set(references(tree))
            if ORDER.index(package) > ORDER.index(owner) and (owner, package) not in BY_NAME
        }
    hold(uphill, "uphill")


def test_minivit_itself_begins_with_the_model():
    """``import minivit`` reads base, layers, options and model alone."""
    assert set(origins().values()) <= {"base", "layers", "model"}


def test_the_package_imports_no_script_and_no_tool():
    others = {path.stem for folder in ("scripts", "tools") for path in (ROOT / folder).glob("*.py")}
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {module.split(".")[0] for module in modules} & (others | {"scripts", "tools"}), file


def test_the_check_sees_every_kind_of_import():
    """Lazy ones, those of a name of minivit itself, and modules named in a text."""
    for text in (
        "from minivit.commands import cli",
        "import minivit.commands.cli",
        "def f():\n    from minivit.commands.cli import run",
        'importlib.import_module("minivit.commands.cli")',
        'importlib.import_module(f"minivit.commands.{name}")',
        "from minivit import commands",
    ):
        assert set(references(ast.parse(text))) == {"commands"}, text
    assert set(references(ast.parse("from minivit import InputError, ViT"))) == {"base", "model"}
    assert set(references(ast.parse('"""Like minivit.commands.cli, in prose."""'))) == set()


# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_names_of_minivit():
    assert set(minivit.__all__) == {
        "PRESETS", "InputError", "ViT", "ViTConfig", "__version__", "parameter_table",
        "softmax_cross_entropy_backward", "softmax_cross_entropy_forward",
    }  # fmt: skip
    assert set(minivit.model.__all__) >= {"PRESETS", "ViT", "ViTConfig", "parameter_table", "preset_fields"}


def names_listed(package):
    """``__all__`` of a package."""
    values = [n.value for n in TREES[f"{package}/__init__.py"].body if isinstance(n, ast.Assign) and _is_list(n)]
    return ast.literal_eval(values[0]) if values else []


def _is_list(node):
    return [target.id for target in node.targets if isinstance(target, ast.Name)] == ["__all__"]


def test_what_others_take_from_a_package_is_listed():
    """``from minivit.data import load``: ``load`` is in ``minivit.data.__all__``, or a module."""
    unlisted = set()
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            package = node.module.removeprefix("minivit.") if isinstance(node, ast.ImportFrom) else ""
            if package not in ORDER or file.startswith(f"{package}/"):
                continue
            offered = {*names_listed(package), *(path.stem for path in (PACKAGE / package).iterdir())}
            unlisted |= {f"{package}: {alias.name}" for alias in node.names if alias.name not in offered}
    hold(unlisted, "unlisted")


@pytest.mark.parametrize("package", [package for package in ORDER if f"{package}/__init__.py" in TREES])
def test_the_names_that_a_package_lists_are_there(package):
    module, names = importlib.import_module(f"minivit.{package}"), names_listed(package)
    assert len(names) == len(set(names)) and all(hasattr(module, name) for name in names)


def test_private_names_stay_in_their_file():
    private = {
        f"{file}: {alias.name}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("minivit")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    }
    hold(private, "private")


def test_every_module_and_every_public_function_says_what_it_is():
    undocumented = {file for file, tree in TREES.items() if not ast.get_docstring(tree)}
    for file, tree in TREES.items():
        public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        undocumented |= {f"{file}: {node.name}" for node in public if not ast.get_docstring(node)}
    hold(undocumented, "undocumented")


# ---- lengths ---------------------------------------------------------------------------------------------------------

FUNCTION, FILE = 60, 400  # lines; tables, which are values written at the top of a module, do not count
SHORT = {"model/vit.py": 150, "training/loop.py": 150}


def lines_of(node):
    """How many lines a statement takes."""
    return node.end_lineno - node.lineno + 1


def functions_of(node, owner=""):
    """Every function in a file, with the names of what holds it: (``Trainer.step``, node)."""
    for child in ast.iter_child_nodes(node):
        name = f"{owner}{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
        if isinstance(child, ast.FunctionDef):
            yield name, child
        yield from functions_of(child, f"{name}." if name else owner)


def lines_without_tables(file):
    """How many lines a file has, without dicts, lists, tuples and calls that are written as values at its top."""
    tables = [
        node
        for node in TREES[file].body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Dict | ast.List | ast.Tuple | ast.Set | ast.Call)
    ]
    length = len((PACKAGE / file).read_text(encoding="utf-8").splitlines())
    return length - sum(lines_of(node) for node in tables if lines_of(node) > 10)


def test_functions_are_short():
    long = {
        f"{file}: {name}"
        for file, tree in TREES.items()
        for name, node in functions_of(tree)
        if lines_of(node) > FUNCTION
    }
    hold(long, "functions")


def test_files_are_short():
    long = {file for file in TREES if lines_without_tables(file) > SHORT.get(file, FILE)}
    long |= SHORT.keys() - TREES.keys()  # those that are still to come
    hold(long, "files")


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_a_script_is_three_lines_over_its_command(script):
    name, text = script.stem, script.read_text(encoding="utf-8")
    assert text == f"from minivit.commands import {name}\nfrom minivit.commands.cli import run\n\nrun({name}.main)\n"


# ---- nothing outside -------------------------------------------------------------------------------------------------


def climbs_of(tree):
    """How many folders each ``Path(__file__)...`` of a file climbs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
            climb, inner = 0, node
            while not isinstance(inner, ast.Name):
                if isinstance(inner, ast.Attribute):
                    climb, inner = climb + (inner.attr == "parent") + (inner.attr == "with_name"), inner.value
                elif isinstance(inner, ast.Subscript) and getattr(inner.value, "attr", "") == "parents":
                    climb, inner = climb + 1 + ast.literal_eval(inner.slice), inner.value
                elif isinstance(inner, ast.Call):
                    inner = inner.args[0] if isinstance(inner.func, ast.Name) and inner.args else inner.func
                else:
                    break
            if isinstance(inner, ast.Name) and inner.id == "__file__":
                yield climb


def test_no_file_climbs_out_of_the_package():
    out = {file for file, tree in TREES.items() if max(climbs_of(tree), default=0) > len(file.split("/"))}
    hold(out, "outside")
    assert max(climbs_of(ast.parse("Path(__file__).resolve().parent.parent / 'x'"))) == 2
    assert max(climbs_of(ast.parse("Path(__file__).parents[2]"))) == 3
    assert max(climbs_of(ast.parse("Path(__file__).with_name('kernels.cu')"))) == 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder that holds a copy of the package and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(PACKAGE, folder / "minivit", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("train --config cifar10 --quiet", 2, "minivit data fetch cifar10"),
        ("gradcheck linear", 0, "largest relative error"),
        ("paper list", 0, "paper-table8"),
    ],
)
def test_the_package_alone_has_its_settings(alone, tmp_path, words, status, said):
    done = subprocess.run(
        [sys.executable, "-m", "minivit", *words.split()], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(alone)},
    )  # fmt: skip
    assert done.returncode == status and said in done.stdout + done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_tests_mirror_the_package():
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("*/test_*.py")}
    assert folders <= {*ORDER, "tools"}
    assert {path.name for path in (ROOT / "tests").glob("test_*.py")} == {"test_house.py", "test_first_version.py"}
