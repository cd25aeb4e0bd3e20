"""Where settings come from: a YAML file, the environment, flags; merged, each value knowing its place.

Knows no setting by name and validates nothing: ``config.py`` does, and asks here where a bad value was written.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

ENV_PREFIX: Final = "OPTA_LMX__"

# No setting lies deeper, while an alias in the file that contains itself would have no end.
_MAX_DEPTH: Final = 16

KeyPath: TypeAlias = tuple[str, ...]


class ConfigError(Exception):
    """A setting cannot be used. ``str()`` is ``file:line: key: reason``, without the parts that do not apply.

    ``file`` is a path, the name of an environment variable or "command line"; ``line`` counts from 1. No part
    of it carries the value of a setting, which may be a key.
    """

    def __init__(
        self, reason: str, *, key: str | None = None, file: str | None = None, line: int | None = None
    ) -> None:
        place = f"{file}:{line}" if line is not None else file
        super().__init__(": ".join(part for part in (place, key, reason) if part))
        self.file = file
        self.line = line
        self.key = key
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written; ``file`` and ``line`` as in ConfigError."""

    file: str
    line: int | None = None


class Sources:
    """The values of all sources as nested dicts; what is read later replaces what was read before."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._origins: dict[KeyPath, Origin] = {}

    def read_file(self, path: Path) -> None:
        """Take the values of a YAML file; comes first. Raises ConfigError."""
        file = str(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", file=file) from None
        except UnicodeDecodeError:
            raise ConfigError("cannot be read: it is not UTF-8 text", file=file) from None
        value, lines = _parse(text, file)
        if not isinstance(value, dict | None):
            raise ConfigError("should be a mapping of sections", file=file, line=1)
        self.values = value or {}
        self._origins = {key: Origin(file, line) for key, line in lines.items()}

    def read_environ(self, environ: Mapping[str, str]) -> None:
        """Take every ``OPTA_LMX__SECTION__KEY``, its value read as YAML. Raises ConfigError."""
        # In sorted order a setting comes before its parts, so that a part can amend it.
        for name in sorted(name for name in environ if name.startswith(ENV_PREFIX)):
            section, *keys = name.removeprefix(ENV_PREFIX).lower().split("__")
            if not (section and keys and all(keys)):
                raise ConfigError(f"names no setting; write {ENV_PREFIX}SECTION__KEY", file=name)
            value, _ = _parse(environ[name], name)
            self.put((section, *keys), value, Origin(name))

    def put(self, path: KeyPath, value: object, origin: Origin) -> None:
        """Set what is at ``path``, replacing all of what was there."""
        for stale in [known for known in self._origins if known[: len(path)] == path]:
            del self._origins[stale]
        parent = self.values
        for depth, name in enumerate(path[:-1], start=1):
            if not isinstance(parent.get(name), dict):
                parent[name] = {}
                self._origins[path[:depth]] = origin
            parent = parent[name]
        parent[path[-1]] = value
        self._origins[path] = origin

    def error(self, path: KeyPath, reason: str) -> ConfigError:
        """The error of the setting at ``path``, placed where it, or the nearest part above it, was written."""
        places = (self._origins.get(path[:depth]) for depth in range(len(path), 0, -1))
        origin = next((place for place in places if place), None)
        key = ".".join(path)
        return (
            ConfigError(reason, key=key, file=origin.file, line=origin.line) if origin else ConfigError(reason, key=key)
        )


def _parse(text: str, file: str) -> tuple[Any, dict[KeyPath, int]]:
    """The value of a YAML text, and the line of every key and list item in it; raises ConfigError."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # Names of tags, anchors and aliases are left out: a key without quotes may begin with ! or & or *.
        problem = re.sub(r""" (['"])[^<\\]{2,}\1""", "", getattr(error, "problem", None) or "unreadable characters")
        line = None if mark is None else mark.line + 1
        raise ConfigError(f"is not YAML: {problem}", file=file, line=line) from None

    lines: dict[KeyPath, int] = {}
    for path, line in _walk(node, ()):
        if path in lines:
            reason = f"is set twice, first on line {lines[path]}"
            raise ConfigError(reason, key=".".join(path), file=file, line=line)
        if len(path) > _MAX_DEPTH:
            raise ConfigError("is nested too deeply", key=path[0], file=file, line=line)
        lines[path] = line
    return value, lines


def _walk(node: yaml.Node | None, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """Every key and list item below ``node`` with its line, in the order of the text."""
    parts: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        parts = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = [(str(index), item, item) for index, item in enumerate(node.value)]
    for name, marked, value in parts:
        yield (*path, name), marked.start_mark.line + 1
        yield from _walk(value, (*path, name))
