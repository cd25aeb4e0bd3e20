"""The project's own source as the house tests read it: every module parsed once, nothing imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parents[3]
SRC = ROOT / "src"
PACKAGE = SRC / "opta_lmx"

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Module:
    """One file under src, under the name it is imported by."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def at(self, node: ast.AST) -> str:
        """Where a node stands, as an editor takes it."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@dataclass(frozen=True, slots=True)
class Import:
    """One import of one module, wherever it stands; ``inside`` names the functions around it, outermost first."""

    target: str
    node: ast.AST
    inside: tuple[str, ...]


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        text = path.read_text()
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, path, text, ast.parse(text, str(path))))
    return tuple(found)


def functions(module: Module) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def imports(module: Module) -> Iterator[Import]:
    """Every import: at the top, inside functions, under TYPE_CHECKING and through ``import_module("...")``.

    ``from a import b`` is an import of ``a.b`` if that is one of our modules, else of ``a``.
    """
    known = {other.name for other in modules()}
    for node, inside in _walk(module.tree, ()):
        match node:
            case ast.Import(names=names):
                targets = [alias.name for alias in names]
            case ast.ImportFrom(module=str(parent), names=names, level=0):
                targets = [child if (child := f"{parent}.{alias.name}") in known else parent for alias in names]
            case ast.ImportFrom():
                raise AssertionError(f"{module.at(node)}: a relative import")
            case ast.Call(func=func, args=[ast.Constant(value=str(target)), *_]) if _called(func) in _IMPORTERS:
                targets = [target]
            case _:
                continue
        for target in dict.fromkeys(targets):
            yield Import(target, node, inside)


_IMPORTERS = {"import_module", "__import__"}


def _called(func: ast.expr) -> str | None:
    return func.id if isinstance(func, ast.Name) else func.attr if isinstance(func, ast.Attribute) else None


def called(call: ast.Call) -> str | None:
    """The last word of what is called: ``f`` for ``f()`` and for ``a.b.f()``."""
    return _called(call.func)


def _walk(node: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[ast.AST, tuple[str, ...]]]:
    for child in ast.iter_child_nodes(node):
        yield child, inside
        yield from _walk(child, (*inside, child.name) if isinstance(child, Function) else inside)


def nodes(module: Module) -> Iterator[tuple[ast.AST, tuple[str, ...]]]:
    """Every node with the names of the functions around it, outermost first."""
    return _walk(module.tree, ())
