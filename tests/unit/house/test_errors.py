"""Every error this server names has one place in HTTP and one in the documentation."""

import ast

import pytest

from tests.unit.house.source import ROOT, Module, modules

_SPEC = ROOT / "docs" / "plans" / "API-SPEC.md"


def _named_errors() -> set[str]:
    """Every class that descends from LmxError, wherever it is defined."""
    parents = {
        node.name: {base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in node.bases}
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    family = {"LmxError"}
    while grown := {name for name, bases in parents.items() if bases & family} - family:
        family |= grown
    return family


def _table_keys(module: Module) -> set[str]:
    """The names that are keys of the module's dictionaries: its one table."""
    keys = [key for node in ast.walk(module.tree) if isinstance(node, ast.Dict) for key in node.keys]
    return {key.id if isinstance(key, ast.Name) else getattr(key, "attr", "") for key in keys}


@pytest.fixture(scope="module")
def errors() -> set[str]:
    """The family, which is known not to be empty."""
    found = _named_errors()
    assert {"LmxError", "ModelNotFound", "WorkerLost"} <= found
    return found


def test_every_error_has_its_status(errors: set[str]) -> None:
    """api/errors.py has a row for each, so that none is answered by accident of inheritance."""
    [table] = [module for module in modules() if module.name == "opta_lmx.api.errors"]
    assert errors - _table_keys(table) == set()


def test_every_error_is_documented(errors: set[str]) -> None:
    """docs/plans/API-SPEC.md names each."""
    text = _SPEC.read_text()
    assert {name for name in errors if f"`{name}`" not in text} == set()
