"""A requested name -> the id of a model on this machine: ids, presets, aliases and globs. Pure.

The engine asks for every request; ``check_aliases`` is for whoever reads the configuration.
"""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Final

from opta_lmx.config import ConfigError
from opta_lmx.errors import ModelNotFound

# An alias may name another alias; nobody needs more steps, and a loop must end somewhere.
MAX_STEPS: Final = 8

# Two directory names of 255 bytes and the slash: nothing longer can be on disk.
MAX_NAME_CHARACTERS: Final = 511

_GLOB: Final = frozenset("*?[")
_BRACKETS: Final = re.compile(r"\[.[^]]*\]")


def resolve(
    name: str, known: Collection[str], aliases: Mapping[str, str], presets: Mapping[str, str] | None = None
) -> str:
    """The id, one of ``known``, that ``name`` stands for. ``presets`` maps a preset's name to its model's.

    At every step, first match wins: 1. an id (also if an alias is called the same), 2. a preset, 3. an alias,
    4. the most specific glob among the aliases (most literal characters, then most ``?`` and brackets, then fewest
    ``*``). What the last three give is looked up again, MAX_STEPS times at most. Case counts. Raises ModelNotFound
    with at most 3 nearest names.
    """
    presets = presets or {}
    current = name
    if is_name(name):
        for _ in range(MAX_STEPS + 1):
            if current in known:  # 1
                return current
            target = _follow(current, aliases, presets)
            if target is None:
                break
            current = target
    shown = name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:MAX_NAME_CHARACTERS]}..."
    raise ModelNotFound(shown, _nearest(name, [*known, *presets, *(alias for alias in aliases if not _is_glob(alias))]))


def preset_behind(
    name: str, known: Collection[str], aliases: Mapping[str, str], presets: Mapping[str, str]
) -> str | None:
    """The first preset on the way from ``name`` to its model, None if there is none; the way is ``resolve``'s."""
    current: str | None = name
    for _ in range(MAX_STEPS + 1):
        if current is None or current in known:
            return None
        if current in presets:
            return current
        current = _follow(current, aliases, presets)
    return None


def is_name(name: str) -> bool:
    """False for what can name no model: empty, overlong, an absolute path, ``.`` or ``..`` as a part, unprintable."""
    parts = name.replace("\\", "/").split("/")
    return len(name) <= MAX_NAME_CHARACTERS and name.isprintable() and not {"", ".", ".."}.intersection(parts)


def check_aliases(aliases: Mapping[str, str], presets: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for an alias or preset that could never work; ``presets`` as for ``resolve``.

    That is one whose name or target is no name, whose target is a glob, or whose chain has more than MAX_STEPS
    steps, as every loop has; a preset that is a glob, and an alias that a preset hides. Steps through a glob are not
    counted: an id that is on disk later may end them.
    """
    presets = presets or {}
    steps = {**aliases, **presets}
    for alias, target in aliases.items():
        key = f"models.aliases.{alias}"
        _check_step(alias, target, key)
        if alias in presets:
            raise ConfigError("is the name of a preset too, which comes first", key=key)
        _check_chain(alias, steps, key)
    for preset, target in presets.items():
        key = f"models.presets.{preset}"
        _check_step(preset, target, key)
        if _is_glob(preset):
            raise ConfigError("should be one name; only aliases can be patterns", key=key)
        _check_chain(preset, steps, key)


def _check_step(name: str, target: str, key: str) -> None:
    if not is_name(name):
        raise ConfigError("cannot be the name of a model", key=key)
    if not is_name(target) or _is_glob(target):
        raise ConfigError("its target should be the name of one model", key=key)


def _check_chain(name: str, steps: Mapping[str, str], key: str) -> None:
    chain = [name]
    while (step := steps.get(chain[-1])) is not None:
        if step in chain:
            raise ConfigError(f"goes round in a circle: {' -> '.join([*chain, step])}", key=key)
        chain.append(step)
    if len(chain) > MAX_STEPS + 1:
        raise ConfigError(f"has more than {MAX_STEPS} steps: {' -> '.join(chain)}", key=key)


def _follow(name: str, aliases: Mapping[str, str], presets: Mapping[str, str]) -> str | None:
    """One step from a name that is no id; None where there is none."""
    if name in presets:  # 2
        return presets[name]
    if name in aliases:  # 3
        return aliases[name]
    matching = [alias for alias in aliases if _is_glob(alias) and fnmatchcase(name, alias)]
    return aliases[min(matching, key=_generality)] if matching else None  # 4


def _is_glob(alias: str) -> bool:
    return not _GLOB.isdisjoint(alias)


def _generality(pattern: str) -> tuple[int, int, int, str]:
    """Sorts the more specific pattern first; the pattern itself decides between equals."""
    plain = _BRACKETS.sub("?", pattern)
    stars, singles = plain.count("*"), plain.count("?")
    return stars + singles - len(plain), -singles, stars, pattern


def _nearest(name: str, names: Collection[str]) -> list[str]:
    """At most 3 of ``names`` that look like ``name``, best first, whatever the case."""
    if len(name) > MAX_NAME_CHARACTERS:
        return []
    by_folded = {candidate.casefold(): candidate for candidate in names}
    return [by_folded[folded] for folded in get_close_matches(name.casefold(), by_folded, n=3)]
