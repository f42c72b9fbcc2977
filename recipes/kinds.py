"""What a registry holds, read from the source of its folder: the help of a verb must not import torch.

`tests/recipes/test_kinds.py` holds it against the registries themselves.
"""

import ast
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from docstring_parser import DocstringStyle, parse

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Option:
    """An option of a kind: its type (None for an object), its default as YAML has it, and what it means."""

    name: str
    type: Any
    default: str
    help: str
    kinds: tuple["Kind", ...] = ()  # the objects between which it chooses

    def __str__(self) -> str:
        literals = [self.type, *get_args(self.type)]
        choices = [one for kind in literals if get_origin(kind) is Literal for one in get_args(kind)]
        choices = ", ".join([*choices, *(kind.brief() for kind in self.kinds)])
        return f"{self.help}{f' [{choices}]' if choices else ''} (default: {self.default})"


@dataclass(frozen=True)
class Kind:
    """A member of a registry."""

    name: str
    help: str
    options: tuple[Option, ...]

    def brief(self) -> str:
        """`mse {steps: 25}`, as an option of another kind shows it."""
        return f"{self.name} {{{', '.join(f'{one.name}: {one.default}' for one in self.options)}}}".removesuffix(" {}")


@cache
def kinds(registry: str) -> tuple[Kind, ...]:
    """The kinds of a registry, which is named by its folder and variable: `compress/quantization:METHODS`."""
    folder, _, name = registry.partition(":")
    return _Source(ROOT / folder).kinds(name)


def describe(key: str, registry: str, beside: bool) -> str:
    """The kinds of a registry with their options and defaults, for the help of the option `key`.

    beside: whether a flag needs no `key.` before the name of an option.
    """
    width = min(120, shutil.get_terminal_size().columns)
    alone = "--OPTION VALUE" if beside else f"--{key}.OPTION VALUE"
    lines = [f"{key}: NAME, or {{kind: NAME, option: value, ...}}; one option alone: {alone}"]
    for kind in kinds(registry):
        rows = [(f"  {kind.name}", kind.help), *((f"    {one.name}", str(one)) for one in kind.options)]
        for label, text in rows:
            wrapped = textwrap.wrap(text, max(40, width - 24), break_on_hyphens=False) or [""]
            lines += [f"{label:23} {wrapped[0]}", *(f"{'':24}{more}" for more in wrapped[1:])]
    return "\n".join(lines)


class _Source:
    """Classes and constants of a folder of modules, by name."""

    def __init__(self, folder: Path) -> None:
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))]
        nodes = [node for tree in trees for node in tree.body]
        self.every = [node for node in nodes if isinstance(node, ast.ClassDef)]
        self.classes = {node.name: node for node in self.every}
        self.constants: dict[str, Any] = {"Literal": Literal}
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants.setdefault(node.targets[0].id, self.value(node.value))

    def value(self, node: ast.expr) -> Any:
        """The value of an expression of constants and plain types; None for any other."""
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        plain = {"int", "float", "str", "bool", "dict", "list", "tuple"}
        if any(isinstance(one, ast.Call) for one in ast.walk(node)) or names - plain - self.constants.keys():
            return None
        return eval(compile(ast.Expression(node), "<constant>", "eval"), dict(self.constants))

    def kinds(self, registry: str) -> tuple[Kind, ...]:
        return tuple(sorted((self.kind(*one) for one in self.registered(registry)), key=lambda kind: kind.name))

    def registered(self, registry: str) -> Iterator[tuple[ast.ClassDef, str]]:
        for node in self.every:
            for one in node.decorator_list:
                if isinstance(one, ast.Call) and ast.unparse(one.func) == f"{registry}.register":
                    yield node, one.args[0].value

    def kind(self, node: ast.ClassDef, name: str) -> Kind:
        first = (ast.get_docstring(node) or "").partition("\n\n")[0]
        return Kind(name, " ".join(first.split()), tuple(self.options(node)))

    def options(self, node: ast.ClassDef) -> Iterator[Option]:
        """The options of a class and of its bases; those of a `format` that the class attribute `grid` names."""
        bodies = self.lineage(node)
        fields = {one.target.id: one for body in bodies for one in body.body if isinstance(one, ast.AnnAssign)}
        plain = [body for body in bodies if "dataclass" not in "".join(map(ast.unparse, body.decorator_list))]
        helps = {one.arg_name: one.description for body in bodies for one in self.arguments(body)}
        grid = self.value(fields["grid"].value) if "grid" in fields else ()
        for name, field in fields.items():
            hint = ast.unparse(field.annotation)
            own = any(field in body.body for body in bodies if body not in plain)
            if name.startswith("_") or hint.startswith("ClassVar") or not own:
                continue
            more = {one.arg: one.value for one in getattr(field.value, "keywords", ())}
            default = more.get("default", more.get("default_factory", field.value))
            if name == "format":
                given = {one.arg: self.shown(one.value) for one in getattr(getattr(default, "body", 0), "keywords", ())}
                inner = {one.name: one for one in self.options(self.classes[hint])}
                yield from (replace(inner[one], default=given.get(one, inner[one].default)) for one in grid)
            else:
                inside = self.kinds(ast.unparse(more["metadata"].values[0])) if "metadata" in more else ()
                kind = None if "metadata" in more else self.value(field.annotation)
                yield Option(name, kind, self.shown(default), " ".join(helps.get(name, "").split()), inside)

    @staticmethod
    def arguments(node: ast.ClassDef) -> list[Any]:
        return parse(ast.get_docstring(node) or "", DocstringStyle.GOOGLE).params

    def lineage(self, node: ast.ClassDef) -> list[ast.ClassDef]:
        """The bases of a class that are in the folder, then the class."""
        bases = [self.classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in self.classes]
        return [*(one for base in bases for one in self.lineage(base)), node]

    def shown(self, node: ast.expr | None) -> str:
        """A default as YAML has it: an object by its kind."""
        if node is None:
            return "to be given"
        called = node.func if isinstance(node, ast.Call) else node
        if isinstance(called, ast.Name) and called.id in self.classes:
            decorators = self.classes[called.id].decorator_list
            return next((one.args[0].value for one in decorators if isinstance(one, ast.Call) and one.args), called.id)
        value = self.value(node)
        return ",".join(value) or "none" if isinstance(value, tuple) else {None: "none"}.get(value, str(value).lower())
