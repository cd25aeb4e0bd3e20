"""Rooms import downwards only, by the table of docs/plans/ARCHITECTURE.md §3."""

import sys

from tests.unit.house.source import Import, Module, imports, modules

_BASE = {"version", "types", "errors", "config"}
_SHARED = {*_BASE, "monitoring", "logging"}
_CHILD = {*_BASE, "output", "protocol", "logging"}
_ALL = {*_SHARED, *_CHILD, "router", "manager", "inference", "worker", "api", "main", "cli", "service"}

# Room -> the rooms it may import besides itself.
_MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "types": set(),
    "errors": {"types"},
    "config": {"types", "errors"},
    "logging": _BASE,
    "monitoring": {*_BASE, "logging"},
    "router": _SHARED,
    "manager": _SHARED,
    "inference": {*_SHARED, "router", "manager", "output", "protocol"},
    "output": _BASE,
    "protocol": _BASE,
    "worker": _CHILD,
    "api": {*_SHARED, "inference", "output", "manager"},
    "service": _SHARED,
    "main": _ALL,
    "cli": _ALL,
}

# Which room a module lives in: the longest of these names that begins its own.
_ROOMS = {
    "opta_lmx": "version",
    "opta_lmx.types": "types",
    "opta_lmx.errors": "errors",
    "opta_lmx.config": "config",
    "opta_lmx.config_fields": "config",
    "opta_lmx.config_models": "config",
    "opta_lmx.config_sources": "config",
    "opta_lmx.config_changes": "config",
    "opta_lmx.monitoring": "monitoring",
    "opta_lmx.monitoring.logging": "logging",
    "opta_lmx.router": "router",
    "opta_lmx.manager": "manager",
    "opta_lmx.inference": "inference",
    "opta_lmx.inference.output": "output",
    "opta_lmx.inference.protocol": "protocol",
    "opta_lmx.inference.worker": "worker",
    "opta_lmx.api": "api",
    "opta_lmx.service": "service",
    "opta_lmx.main": "main",
    "opta_lmx.reload": "main",
    "opta_lmx.cli": "cli",
    "opta_lmx.__main__": "cli",
}

# Third-party modules a layer-0 room may use; rooms that are not listed may use any that is a dependency.
_THIRD_PARTY = {
    "version": set[str](),
    "types": {"msgspec"},
    "errors": set[str](),
    "config": {"pydantic", "pydantic_core", "yaml"},
}

# The packages that bring MLX, or gigabytes, into a process.
_HEAVY = {"mlx", "mlx_lm", "vllm_mlx", "transformers"}


def _room(name: str) -> str:
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    found = next(_ROOMS[prefix] for prefix in prefixes if prefix in _ROOMS)
    if found == "version" and name != "opta_lmx":
        raise AssertionError(f"{name} is in no room of the layer table")
    return found


def _is_allowed(module: Module, found: Import) -> bool:
    top = found.target.partition(".")[0]
    room = _room(module.name)
    if top in _HEAVY and room != "worker":
        return False
    if top != "opta_lmx":
        return top in sys.stdlib_module_names or top in _THIRD_PARTY.get(room, {top})
    target = _room(found.target)
    if room == "cli" and target == "main":
        # `opta-lmx --help` must not pay for the server.
        return "serve" in found.inside or (module.name == "opta_lmx.cli.serve" and bool(found.inside))
    return target in {room, *_MAY_IMPORT[room]}


def test_rooms_import_downwards_only() -> None:
    """No module imports a room its own may not use: lazily, for types or by name, it counts all the same."""
    wrong = [
        f"{module.at(found.node)}: {_room(module.name)} imports {found.target}"
        for module in modules()
        for found in imports(module)
        if not _is_allowed(module, found)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_row() -> None:
    """The tables above name the same rooms, so none is free of the rule."""
    assert set(_ROOMS.values()) == set(_MAY_IMPORT)
    assert {_room(module.name) for module in modules()} <= set(_MAY_IMPORT)
