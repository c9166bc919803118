"""Where the source makes the texts that become `Leftover.cause`.

A text is a string literal, an f-string, a sum of strings, or a call of `in_short` or `str`. It is
the cause of a leftover where it is passed to a parameter of `CARRIERS` (`Leftover(..., cause=...)`,
`Reason(...)`), assigned to a variable, an item or an attribute of such a name, or returned as a
string by a function that is called in one of these places. Names of constants and of variables of
the same function stand for their values. All texts in a function `cause`, where a `Leftover` is
printed, are one place.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from harness.house import Module

CARRIERS = frozenset({"cause", "causes", "refused", "unsure", "unseen"})
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_MAKES_TEXT = {"in_short", "str"}
_FILLS = {"update", "append", "extend", "setdefault"}


@dataclass(frozen=True, order=True)
class Cause:
    """One text: the module, the line, and the source of the expression."""

    module: str
    line: int
    text: str


def leftover_causes(modules: Iterable[Module]) -> list[Cause]:
    """All places, by module and line."""
    return sorted(_Search(modules).places())


class _Search:
    def __init__(self, modules: Iterable[Module]) -> None:
        self._modules = list(modules)
        self._parameters: dict[str, list[str]] = {}
        self._functions: dict[str, list[ast.AST]] = defaultdict(list)
        self._constants: dict[str, ast.expr] = {}
        self._module_of: dict[int, str] = {}
        self._texts: dict[int, ast.expr] = {}
        self._seen: set[int] = set()
        for module in self._modules:
            self._read(module)

    def places(self) -> set[Cause]:
        for module in self._modules:
            for function in [n for n in ast.walk(module.tree) if isinstance(n, _FUNCTIONS)]:
                for value in self._carried(function):
                    self._follow(value, function)
        places = {
            Cause(self._module_of[key], text.lineno, ast.unparse(text))
            for key, text in self._texts.items()
        }
        for function in self._functions["cause"]:
            module = self._module_of[id(function)]
            inside = range(function.lineno, (function.end_lineno or 0) + 1)
            within = {c for c in places if c.module == module and c.line in inside}
            places = (places - within) | {Cause(module, function.lineno, "where it is printed")}
        return places

    def _read(self, module: Module) -> None:
        for node in ast.walk(module.tree):
            self._module_of[id(node)] = module.dotted
            if isinstance(node, ast.ClassDef):
                self._parameters[node.name] = _fields(node)
            elif isinstance(node, _FUNCTIONS):
                self._functions[node.name].append(node)
                arguments = node.args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
                self._parameters[node.name] = [n for n in names if n not in {"self", "cls"}]
        for node in module.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                    self._constants[name] = value

    def _carried(self, function: ast.AST) -> Iterator[ast.expr]:
        """The expressions of a function that stand where a cause is carried."""
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=[target], value=value):
                    if _name_of(target) in CARRIERS:
                        yield value
                case ast.AnnAssign(value=ast.expr() as value) | ast.AugAssign(value=value):
                    if _name_of(node.target) in CARRIERS:
                        yield value
                case ast.Call():
                    yield from self._arguments(node)

    def _arguments(self, call: ast.Call) -> Iterator[ast.expr]:
        called = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if called in _FILLS and _name_of(call.func) in CARRIERS:
            yield from call.args
        for name, value in zip(self._parameters.get(called, []), call.args, strict=False):
            if name in CARRIERS:
                yield value
        for word in call.keywords:
            if word.arg in CARRIERS:
                yield word.value

    def _follow(self, node: ast.expr, function: ast.AST) -> None:
        """Note the texts of which an expression takes its value."""
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        match node:
            case ast.JoinedStr() | ast.BinOp(op=ast.Add()):
                self._texts[id(node)] = node
            case ast.Constant(value=str() as text) if text:
                self._texts[id(node)] = node
            case ast.Name(id=name) if name in self._constants:
                self._follow(self._constants[name], function)
        found = self._from_call(node) if isinstance(node, ast.Call) else _alternatives(node)
        for each in [*found, *_assigned(function, node)]:
            self._follow(each, function)

    def _from_call(self, call: ast.Call) -> list[ast.expr]:
        called = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if called in _MAKES_TEXT:
            self._texts[id(call)] = call
        elif called in {"fromkeys", "get"}:
            return call.args[1:]
        elif called == "dict":
            return call.args
        else:
            for function in self._functions.get(called, []):
                if "str" in ast.unparse(getattr(function, "returns", None) or ast.Constant(0)):
                    for node in ast.walk(function):
                        if isinstance(node, ast.Return) and node.value is not None:
                            self._follow(node.value, function)
        return []


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """The parts of an expression that may be its value, or the values in it."""
    match node:
        case ast.IfExp():
            return [node.body, node.orelse]
        case ast.BoolOp() | ast.Dict():
            return node.values
        case ast.DictComp() | ast.Await() | ast.NamedExpr():
            return [node.value]
        case ast.ListComp(elt=part) | ast.GeneratorExp(elt=part) | ast.Lambda(body=part):
            return [part]
        case ast.Tuple() | ast.List():
            return node.elts
    return []


def _fields(node: ast.ClassDef) -> list[str]:
    """The arguments of a class, in order: those of `__init__`, else its annotated fields."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return [a.arg for a in each.args.args[1:]]
    return [
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]


def _name_of(node: ast.expr) -> str:
    """`causes` of `causes`, `self.causes`, `causes[key]`, `causes.update`, `x.setdefault(...)`."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(attr=name, value=value):
            return _name_of(value) if name in _FILLS else name
        case ast.Subscript(value=value) | ast.Call(func=value):
            return _name_of(value)
    return ""


def _assigned(function: ast.AST, variable: ast.expr) -> Iterator[ast.expr]:
    """What a function assigns to a variable, or unpacks first from the parts of a loop."""
    for node in ast.walk(function) if isinstance(variable, ast.Name) else ():
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.For(target=ast.Tuple(elts=[ast.Name(id=name), *_]), iter=value)
                | ast.comprehension(target=ast.Tuple(elts=[ast.Name(id=name), *_]), iter=value)
            ) if name == variable.id:
                yield value
