"""Files, functions and parameter lists stay small, and no module is a drawer for odds and ends."""

import ast

from tests.unit.house.source import ROOT, Function, functions, modules

_FILE_LINES = 400
_FUNCTION_LINES = 60
_PARAMETERS = 6
_DRAWERS = {"utils", "util", "helpers", "helper", "common", "core", "base", "impl", "misc", "shared"}


def test_files_stay_within_their_budget() -> None:
    """A file of more than 400 lines holds two concepts."""
    sizes = {str(module.path.relative_to(ROOT)): len(module.text.splitlines()) for module in modules()}
    assert {path: lines for path, lines in sizes.items() if lines > _FILE_LINES} == {}


def test_functions_stay_within_their_budget() -> None:
    """A function of more than 60 lines does two things."""
    long = {
        f"{module.at(function)} {function.name}": lines
        for module in modules()
        for function in functions(module)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > _FUNCTION_LINES
    }
    assert long == {}


def test_parameter_lists_stay_within_their_budget() -> None:
    """More than six parameters, self not counted, are a type without a name."""
    wide = {
        f"{module.at(function)} {function.name}": count
        for module in modules()
        for function in functions(module)
        if (count := _parameters(function)) > _PARAMETERS
    }
    assert wide == {}


def test_no_module_is_a_drawer() -> None:
    """A function with no home is a missing concept or belongs to its one caller."""
    paths = [path for folder in ("src", "tests", "scripts") for path in (ROOT / folder).rglob("*")]
    assert [str(path) for path in paths if path.stem.lower() in _DRAWERS] == []


def _parameters(function: Function) -> int:
    arguments: ast.arguments = function.args
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for index, name in enumerate(named) if index or name not in {"self", "cls"}])
