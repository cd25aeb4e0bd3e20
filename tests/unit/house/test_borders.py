"""Failures keep their names, tasks have owners, and what is public says what it gives."""

import ast
from collections.abc import Iterator
from typing import TypeAlias

from tests.unit.house.source import Function, Module, called, modules, nodes

# The three borders where anything may be caught: module -> the function, None for the whole module.
_BORDERS = {
    "opta_lmx.inference.worker.__main__": None,
    "opta_lmx.main": "_supervise",
    "opta_lmx.cli": "main",
}
_EVERYTHING = {"Exception", "BaseException"}

# The functions that may start a task: module -> function.
_TASK_STARTERS = {
    "opta_lmx.main": "start_soon",  # Supervisor keeps every task, hears of its failure and awaits its end
}


def test_only_the_borders_catch_everything() -> None:
    """Elsewhere an unnamed exception is a bug that must be seen; clean-up that raises again is not a catch."""
    wrong = [
        module.at(node)
        for module in modules()
        for node, inside in nodes(module)
        if _catches_everything(node) and not _is_border(module, inside)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_task_is_started_without_an_owner() -> None:
    """An owner waits for its tasks and hears of their failures; a bare task can vanish with its exception."""
    starters = {"create_task", "ensure_future", "run_coroutine_threadsafe"}
    wrong = [
        module.at(node)
        for module in modules()
        for node, inside in nodes(module)
        if isinstance(node, ast.Call) and called(node) in starters and _TASK_STARTERS.get(module.name) not in inside
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_public_has_a_docstring() -> None:
    """Modules, classes, functions and methods; not the methods of a Protocol whose body is the ellipsis."""
    mute = [
        f"{module.at(node)} {name}"
        for module in modules()
        for name, node in _public(module.name, module.tree)
        if ast.get_docstring(node) is None
    ]
    assert not mute, "\n".join(mute)


def _is_border(module: Module, inside: tuple[str, ...]) -> bool:
    if module.name not in _BORDERS:
        return False
    function = _BORDERS[module.name]
    return function is None or function in inside


def _catches_everything(node: ast.AST) -> bool:
    match node:
        case ast.ExceptHandler(type=None):
            return True
        case ast.ExceptHandler(type=ast.expr() as caught, body=body):
            raises_again = isinstance(body[-1], ast.Raise) and body[-1].exc is None
            return bool(_names(caught) & _EVERYTHING) and not raises_again
        case ast.Call(args=caught_types) if called(node) == "suppress":
            return any(_names(caught) & _EVERYTHING for caught in caught_types)
    return False


def _names(caught: ast.expr) -> set[str]:
    return {name.id for name in ast.walk(caught) if isinstance(name, ast.Name)}


_Documented: TypeAlias = ast.Module | ast.ClassDef | Function


def _public(name: str, node: _Documented) -> Iterator[tuple[str, _Documented]]:
    """A module or class and its public members; what is inside a function is nobody else's."""
    if not isinstance(node, ast.Module) or node.body:
        yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _public(child.name, child)
        elif isinstance(child, Function) and not child.name.startswith("_") and not _is_ellipsis(child):
            yield child.name, child


def _is_ellipsis(function: Function) -> bool:
    match function.body:
        case [ast.Expr(value=ast.Constant(value=value))]:
            return value is ...
    return False
