"""Every route is documented."""

import ast
import re
from collections.abc import Iterator

from tests.unit.house.source import ROOT, Module, called, modules

_VERBS = {"get", "post", "put", "patch", "delete"}


def test_every_route_is_documented() -> None:
    """docs/plans/API-SPEC.md writes each as ``METHOD /path``; the names of path parameters do not matter."""
    served = {route for module in modules() if module.name.startswith("opta_lmx.api") for route in _routes(module)}
    assert "GET /v1/models" in served
    documented = _plain((ROOT / "docs" / "plans" / "API-SPEC.md").read_text())
    missing = {route for route in served if not re.search(rf"{re.escape(route)}(?![\w/{{])", documented)}
    assert missing == set()


def _routes(module: Module) -> Iterator[str]:
    """``METHOD /path`` of every ``@router.get("/path")`` in a module, its router's prefix included."""
    prefixes = _prefixes(module)
    for node in ast.walk(module.tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=router)), args=[ast.Constant(value=str(path)), *_]) if (
                router in prefixes and called(node) in _VERBS
            ):
                yield _plain(f"{str(called(node)).upper()} {prefixes[router]}{path}")


def _prefixes(module: Module) -> dict[str, str]:
    """The routers a module makes, by name, with their prefixes."""
    found = {}
    for node in ast.walk(module.tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call) if called(call) == "Router":
                prefix = [keyword.value for keyword in call.keywords if keyword.arg == "prefix"]
                found[name] = str(ast.literal_eval(prefix[0])) if prefix else ""
    return found


def _plain(text: str) -> str:
    return re.sub(r"\{[^}]*\}", "{}", text)
