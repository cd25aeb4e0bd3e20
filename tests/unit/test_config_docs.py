"""The settings stand in the model, in config.yaml and in docs/configuration.md; these tests hold the three together."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from pydantic.fields import FieldInfo

from opta_lmx.config import Config, load_config
from opta_lmx.config_fields import Section
from opta_lmx.config_models import PerModel, Preset

ROOT = Path(__file__).parents[2]

NAMED: dict[str, tuple[str, type[Section]]] = {"models.presets": ("NAME", Preset), "models.per_model": ("ID", PerModel)}


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by dotted key; NAME and ID stand for a user's own keys."""
    for name, info in section.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(info.default, Section):
            yield from leaves(cast("type[Section]", info.annotation), f"{key}.")
            continue
        yield key, info
        if key in NAMED:
            placeholder, inner = NAMED[key]
            yield from leaves(inner, f"{key}.{placeholder}.")


FIELDS = dict(leaves(Config))


def default(info: FieldInfo) -> str:
    """A default as the documents write it."""
    if info.is_required():
        return "required"
    value = list(info.default) if isinstance(info.default, tuple) else info.default
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def bounds(info: FieldInfo) -> str:
    """A range as the documents write it; empty where there is none."""
    limits = {name: getattr(rule, name) for rule in info.metadata for name in ("gt", "ge", "le") if hasattr(rule, name)}
    low = f"above {limits['gt']}" if "gt" in limits else f"{limits.get('ge', '')}"
    if "le" in limits:
        return f"{low} to {limits['le']}"
    return f"{low} and above" if "ge" in limits else low


def values(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= values(value, f"{prefix}{name}.") if value and isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@pytest.mark.parametrize("key", FIELDS)
def test_every_setting_is_documented(key: str) -> None:
    """docs/configuration.md has a row for the setting, with its default, its range and its meaning."""
    info = FIELDS[key]
    rows = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
    row = next((row for row in rows if row.startswith(f"| `{key}` |")), f"no row for {key}")
    assert row.endswith(f" | {default(info)} | {bounds(info)} | {info.description} |")


def test_no_other_setting_is_documented() -> None:
    """docs/configuration.md has no row for a setting that does not exist."""
    rows = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
    documented = [row.split("`")[1] for row in rows if row.startswith("| `") and "." in row.split("`")[1]]
    assert sorted(documented) == sorted(FIELDS)


def test_config_yaml_is_the_defaults() -> None:
    """Reading config.yaml gives what reading nothing gives."""
    assert load_config(ROOT / "config.yaml", environ={}) == Config()


def test_config_yaml_holds_every_setting() -> None:
    """config.yaml leaves no setting out."""
    tree = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    assert list(values(tree)) == [key for key in FIELDS if ".NAME." not in key and ".ID." not in key]


def test_config_yaml_explains_every_setting() -> None:
    """Above each value in config.yaml a comment says its default, as the line below has it, and its range."""
    comment = ""
    explained = []
    for line in (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment = f"{comment} {text.lstrip('# ')}"
            continue
        name, _, value = text.partition(": ")
        if value:
            info = next(info for key, info in FIELDS.items() if key.split(".")[-1] == name and ".NAME." not in key)
            assert f"Default: {value}" in comment, name
            assert not bounds(info) or "Range: " in comment, name
            explained.append(name)
        comment = ""
    assert len(explained) == len([key for key in FIELDS if ".NAME." not in key and ".ID." not in key])


def test_examples_in_config_yaml_are_valid(tmp_path: Path) -> None:
    """What the comments of config.yaml show as examples can be used in their section as it stands."""
    examples: list[str] = []
    for line in (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines():
        if line[:1].isalpha():
            examples.append(line)
        elif line.startswith("  #   "):
            examples.append(line.removeprefix("  #"))
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(examples), encoding="utf-8")
    config = load_config(file, environ={"NIGHTLY_KEY": "a-key-of-thirty-two-characters-00"})
    assert config.models.aliases
    assert config.models.presets
    assert config.models.per_model
    assert config.security.callers
