"""The operators of mutation: each makes one small mistake on purpose, at one place after the other.

Those common to all programs (arithmetic, comparisons, constants, booleans, loops) are cosmic-ray's, by their names in
`GENERIC`; those of array code (transposes, axes, dropped terms, exchanged results, slices) are written here in
cosmic-ray's own form, an `Operator` over a parso tree, and `Provider` offers them as its plugins do.
"""

from __future__ import annotations

from cosmic_ray.ast import ast_nodes
from cosmic_ray.operators.number_replacer import NumberReplacer
from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Name

_BINARY = {"Add": "Sub Mul", "Sub": "Add Mul", "Mul": "Div Add Pow", "Div": "Mul Sub", "FloorDiv": "Div Mul",
           "Mod": "Mul Add", "Pow": "Mul Div Add", "BitOr": "BitAnd", "BitAnd": "BitOr"}  # fmt: skip
_COMPARISONS = {"Lt": "LtE GtE", "LtE": "Lt Gt", "Gt": "GtE LtE", "GtE": "Gt Lt", "Eq": "NotEq", "NotEq": "Eq",
                "Is": "IsNot", "IsNot": "Is"}  # fmt: skip
GENERIC = (
    *(f"ReplaceBinaryOperator_{a}_{b}" for a, others in _BINARY.items() for b in others.split()),
    *(f"ReplaceComparisonOperator_{a}_{b}" for a, others in _COMPARISONS.items() for b in others.split()),
    "ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Not", "AddNot",
    "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ZeroIterationForLoop",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak",
)  # fmt: skip
SYMMETRIC = {"min", "max", "minimum", "maximum", "swapaxes", "array_module"}  # the order of the arguments is no matter
MODULES = {"xp", "np", "math", "os"}  # names whose attributes are functions, not arrays


def _code(node):
    return node.get_code(include_prefix=False)


def _joined(parts):
    return " ".join(map(_code, parts))


def _exchanged(parts, i, k):
    """The source text of nodes with two of them exchanged; the space before each place stays as it was."""
    order = list(parts)
    order[i], order[k] = order[k], order[i]
    texts = [p.get_first_leaf().prefix + _code(q) for p, q in zip(parts, order, strict=True)]
    return "".join(texts).strip()


def _is_call(trailer):
    return trailer.type == "trailer" and trailer.children[0] == "("


def _arguments(trailer):
    """The arguments of a call, without the commas."""
    inner = trailer.children[1:-1]
    if inner and inner[0].type == "arglist":
        inner = inner[0].children
    return [a for a in inner if a != ","]


def _is_positional(argument):
    return argument.type != "argument" and argument.start_pos != argument.end_pos


def _called(trailer):
    """The name of the function that a call's trailer belongs to."""
    siblings = trailer.parent.children
    before = siblings[siblings.index(trailer) - 1]
    return before.children[-1].value if before.type == "trailer" and before.children[0] == "." else _code(before)


class Rewrite(Operator):
    """An operator that replaces a node by other source text: a subclass lists the texts in `changes`."""

    samples = ()  # (before, after) or (before, after, occurrence)

    def changes(self, node):
        """Source texts to put in the node's place, one after the other."""
        raise NotImplementedError

    def mutation_positions(self, node):
        """One position for each change."""
        for _ in self.changes(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        """The change of that index, as one leaf of the tree."""
        leaf = Name(list(self.changes(node))[index], node.start_pos, prefix=node.get_first_leaf().prefix)
        leaf.parent = node.parent  # the walk goes on, and looks at the parents of what follows
        return leaf

    @classmethod
    def examples(cls):
        """Cosmic-ray's examples, from `samples`."""
        return tuple(Example(*sample) for sample in cls.samples)


class OtherNumber(NumberReplacer):
    """Cosmic-ray's operator, which adds and takes 1; the space before the number stays as it is."""

    def mutate(self, node, index):
        """The number and 1, or less 1."""
        changed = super().mutate(node, index)
        changed.value, changed.prefix, changed.parent = changed.value.strip(), node.prefix, node.parent
        return changed


class MatrixProduct(Rewrite):
    """A matrix product becomes an elementwise one."""

    samples = (("a @ b", "a * b"),)

    def changes(self, node):
        if node.type == "operator" and node.value == "@" and node.parent.type == "term":
            yield "*"


class AugmentedAssignment(Rewrite):
    """``x += y`` becomes ``x -= y``, or ``x = y``."""

    samples = (("x += y", "x -= y"), ("x *= y", "x = y", 1))
    table = {"+=": ("-=", "="), "-=": ("+=", "="), "*=": ("/=", "=", "+="), "/=": ("*=", "=")}

    def changes(self, node):
        if node.type == "operator" and node.parent.type == "expr_stmt":
            yield from self.table.get(node.value, ())


class SwapOperands(Rewrite):
    """``a - b`` becomes ``b - a``."""

    samples = (("a - b", "b - a"), ("x @ y @ z", "x @ z @ y", 1))

    def changes(self, node):
        if node.type in ("arith_expr", "term", "power"):
            parts = node.children
            for i in range(1, len(parts), 2):
                if parts[i] in ("-", "/", "//", "%", "@", "**"):
                    yield _exchanged(parts, i - 1, i + 1)


class DropTerm(Rewrite):
    """One operand of a sum, a product, a power or a condition is left out."""

    samples = (("a - b * c", "- b * c"), ("a - b * c", "a", 1), ("x and y", "x", 1))

    def changes(self, node):
        if node.type in ("arith_expr", "term", "power", "and_test", "or_test"):
            parts = node.children
            yield _joined(parts[1:] if parts[1] == "-" else parts[2:])
            for i in range(1, len(parts), 2):
                yield _joined([*parts[:i], *parts[i + 2 :]])


class DropCall(Rewrite):
    """A function is not called, ``xp.sqrt(v)`` becomes ``v``; a method or attribute is left out: ``W`` for ``W.T``."""

    samples = (("y = W.T", "y = W"), ("xp.sqrt(v)", "v"), ("x.sum(axis=0).T", "x.T"), ("min(a, b)", "b", 1))

    def changes(self, node):
        if node.type != "atom_expr":
            return
        parts = node.children
        for i, part in enumerate(parts[1:], start=1):
            if part.type != "trailer":
                continue
            if part.children[0] == "." and parts[0].get_code().strip() not in MODULES | {"self", "cache"}:
                end = i + 2 if i + 1 < len(parts) and _is_call(parts[i + 1]) else i + 1
                yield "".join(map(_code, parts[:i] + parts[end:]))
            elif _is_call(part) and all(_code(p).lstrip(".").isidentifier() for p in parts[:i]):
                if i == 1 or _code(parts[0]) in MODULES:
                    for argument in filter(_is_positional, _arguments(part)):
                        yield "".join([f"({_code(argument)})" if parts[i + 1 :] else _code(argument),
                                       *map(_code, parts[i + 1 :])])  # fmt: skip


class AddTranspose(Rewrite):
    """A factor of a matrix product is transposed."""

    samples = (("a @ b", "a.swapaxes(-1, -2) @ b"), ("matmul(x, W)", "matmul(x, W.swapaxes(-1, -2))", 1))

    def changes(self, node):
        if node.type not in ("name", "atom_expr") or _code(node).endswith((".T", ".swapaxes(-1, -2)")):
            return
        parent = node.parent
        factor = parent.type == "term" and "@" in [c.value for c in parent.children if c.type == "operator"]
        trailer = parent.parent if parent.type == "arglist" else parent
        if factor or (
            trailer.type == "trailer" and _is_call(trailer) and _called(trailer) in ("matmul", "matmul_rows")
        ):
            yield f"{_code(node)}.swapaxes(-1, -2)"


class Swap(Rewrite):
    """Neighbours change places: arguments of a call (the axes of ``transpose`` too), entries of a tuple, results."""

    samples = (
        ("return dx, dW, db", "return dW, dx, db"),
        ("q, k = cache", "k, q = cache"),
        ("x.transpose(0, 2, 1)", "x.transpose(0, 1, 2)", 1),
        ("x[1, 0]", "x[0, 1]"),
    )
    kinds = ("testlist", "testlist_star_expr", "testlist_comp", "exprlist", "subscriptlist", "arglist")

    def changes(self, node):
        if node.type in self.kinds and not any(c.type == "sync_comp_for" for c in node.children):
            if node.type == "arglist" and _called(node.parent) in SYMMETRIC:
                return
            parts = node.children
            for i in range(0, len(parts) - 2, 2):
                if parts[i].type != "argument" and parts[i + 2].type != "argument":
                    yield _exchanged(parts, i, i + 2)


class DropKeyword(Rewrite):
    """A keyword argument is not given."""

    samples = (("x.sum(axis=0, keepdims=True)", "x.sum(keepdims=True)"), ("f(x, out=y)", "f(x)"))

    def changes(self, node):
        if node.type == "trailer" and _is_call(node):
            arguments = _arguments(node)
            for a in arguments:
                if a.type == "argument" and a.children[1] == "=":
                    yield "(" + ", ".join(_code(b) for b in arguments if b is not a) + ")"


class OffByOne(Rewrite):
    """A bound of a slice or of a range moves by one, or one is set where there was none."""

    samples = (
        ("x[:k]", "x[1:k]"),
        ("x[:k]", "x[:k + 1]", 1),
        ("range(n)", "range(n + 1)"),
        ("x[1:]", "x[1:-1]"),
        ("x[w::s]", "x[w - 1::s]", 1),
    )

    def changes(self, node):
        if node.type == "subscript":
            parts = node.children
            colon = parts.index(next(p for p in parts if p == ":"))
            lower = "".join(map(_code, parts[:colon]))
            after = parts[colon + 1 :]
            upper = _code(after[0]) if after and after[0].type != "sliceop" else ""
            rest = _code(parts[-1]) if after and parts[-1].type == "sliceop" else ""
            for moved in self.moved(lower) if lower else ["1"]:
                yield f"{moved}:{upper}{rest}"
            for moved in self.moved(upper) if upper else ["-1"]:
                yield f"{lower}:{moved}{rest}"
        elif node.type == "operator" and node.value == ":" and node.parent.type in ("trailer", "subscriptlist"):
            yield "1:"
            yield ":-1"
        elif node.type == "trailer" and _is_call(node) and _called(node) in ("range", "slice"):
            bounds = [_code(a) for a in _arguments(node)]
            for i, text in enumerate(bounds):
                for moved in self.moved(text):
                    yield "(" + ", ".join([*bounds[:i], moved, *bounds[i + 1 :]]) + ")"

    @staticmethod
    def moved(text):
        """The bound and its neighbours; a plain number is left to `OtherNumber`."""
        return [] if text.lstrip("-").isdigit() else [f"{text} + 1", f"{text} - 1"]


class DropStatement(Rewrite):
    """A statement is left out."""

    samples = (("x += 1\n", "pass\n"), ("return x\n", "pass\n"))

    def changes(self, node):
        if node.parent is not None and node.parent.type == "simple_stmt" and node.type not in ("newline", "string"):
            if _code(node) != "pass" and node.type not in ("import_from", "import_name"):
                yield "pass"


class ForceCondition(Rewrite):
    """A condition is always or never true."""

    samples = (("if a: b\n", "if True: b\n"), ("x = a if b else c", "x = a if False else c", 1))

    def changes(self, node):
        parent = node.parent
        if parent is None or _code(node) in ("True", "False"):
            return
        if (parent.type in ("if_stmt", "while_stmt") and node is parent.children[1]) or (
            parent.type == "test" and node is parent.children[2]
        ):
            yield "True"
            yield "False"


class OtherFunction(Rewrite):
    """A related function is called: mean for sum, max for min, ones for zeros."""

    samples = (("x.sum(axis=0)", "x.mean(axis=0)"), ("min(a, b)", "max(a, b)"))
    table = {
        "sum": "mean", "mean": "sum", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum",
        "argmax": "argmin", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "subtract": "add",
        "cos": "sin", "exp": "log", "log": "exp", "sqrt": "exp",
    }  # fmt: skip

    def changes(self, node):
        if node.type == "name" and node.value in self.table:
            following = node.get_next_leaf()
            if following is not None and following.value == "(":
                yield self.table[node.value]


class OtherName(Rewrite):
    """Another variable is read: the one before or after it in the function; likewise ``cache.norm1`` and ``NORM1``."""

    samples = (
        ("def f(x, y):\n    return y\n", "def f(x, y):\n    return x\n"),
        ("def f(c):\n    return c.a + c.b\n", "def f(c):\n    return c.b + c.b\n"),
    )

    def changes(self, node):
        if node.type != "name" or node.is_definition():
            return
        function, above = None, node
        while above is not None:
            function, above = (above if above.type == "funcdef" else function), above.parent
        if function is None or node.parent.type in ("param", "parameters", "funcdef"):
            return
        following = node.get_next_leaf()
        if following is not None and following.value == "(":
            return
        if node.parent.type == "argument" and node.parent.children[0] is node and node.parent.children[1] == "=":
            return  # the name of a keyword argument
        names = [n for n in ast_nodes(function) if n.type == "name"]
        if node.parent.type == "trailer":
            owner = self.owner(node)
            known = [n.value for n in names if owner and self.owner(n) == owner]
        elif node.value.isupper() and len(node.value) > 1:
            known = [n.value for n in names if n.value.isupper() and len(n.value) > 1]
        else:
            known = [
                n.value
                for n in names
                if n.is_definition() and n.start_pos < node.start_pos and n.parent.type not in ("trailer", "funcdef")
            ]
            known = [name for name in known if name not in MODULES | {"self"}]
        known = list(dict.fromkeys(known))
        if node.value in known:
            i = known.index(node.value)
            yield from known[max(i - 1, 0) : i]
            yield from known[i + 1 : i + 2]

    @staticmethod
    def owner(name):
        """The variable whose attribute the name is (``cache`` in ``cache.norm1``); None for anything else."""
        trailer = name.parent
        if trailer.type != "trailer" or trailer.children[0] != ".":
            return None
        siblings = trailer.parent.children
        first = siblings[0]
        following = name.get_next_leaf()
        called = following is not None and following.value == "("
        return first.value if siblings[1] is trailer and first.type == "name" and not called else None


class OtherText(Rewrite):
    """A string is another one."""

    samples = (('if kind == "erf": pass\n', 'if kind == "erf_": pass\n'),)

    def changes(self, node):
        if node.type == "string" and node.parent.type not in ("simple_stmt", "strings"):
            yield f"{_code(node)[:-1]}_{_code(node)[-1]}"


class OtherFactor(Rewrite):
    """A number with a decimal point is doubled (`OtherNumber` adds and takes 1)."""

    samples = (("x = 1e-6", "x = 2e-06"), ("x = 0.5 * y", "x = 1.0 * y"))

    def changes(self, node):
        if node.type == "number" and set(node.value.lower()) & {".", "e"} and float(node.value):
            yield repr(2 * float(node.value))


OPERATORS = {
    operator.__name__: operator
    for operator in (
        OtherNumber, MatrixProduct, AugmentedAssignment, SwapOperands, DropTerm, DropCall, AddTranspose, Swap,
        DropKeyword, OffByOne, DropStatement, ForceCondition, OtherFunction, OtherName, OtherText, OtherFactor,
    )
}  # fmt: skip


class Provider:
    """Our operators as a provider of cosmic-ray's (entry point group ``cosmic_ray.operator_providers``)."""

    def __iter__(self):
        return iter(OPERATORS)

    def __getitem__(self, name):
        return OPERATORS[name]
