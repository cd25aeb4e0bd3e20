"""What a reload changes: which keys differ, when they take effect, and which values are in force afterwards."""

from collections.abc import Iterator
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.config import Config
from opta_lmx.config_changes import AT_NEXT_LOAD, AT_ONCE, ConfigChanges, compare, in_force
from opta_lmx.config_fields import Section
from opta_lmx.config_models import PerModel


def keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every setting by dotted key, those of single models as ID."""
    for name, info in section.model_fields.items():
        if f"{prefix}{name}" == "models.per_model":
            yield from keys(PerModel, "models.per_model.ID.")
        elif isinstance(info.default, Section):
            yield from keys(cast("type[Section]", info.annotation), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_that_is_promised_exists() -> None:
    """A renamed setting is not left behind in a list, and none is in both."""
    assert not (AT_ONCE | AT_NEXT_LOAD) - set(keys(Config))
    assert AT_ONCE.isdisjoint(AT_NEXT_LOAD)
    # Where the server listens and what is on its disk are settled at the start.
    assert {"server.host", "server.port", "models.models_directory"}.isdisjoint(AT_ONCE | AT_NEXT_LOAD)


def test_equal_settings_change_nothing() -> None:
    """The same values give no key and no section."""
    config = Config.model_validate({"models": {"aliases": {"a": "b"}}, "security": {"api_keys": ["k"]}})
    again = Config.model_validate({"models": {"aliases": {"a": "b"}}, "security": {"api_keys": ["k"]}})
    assert compare(config, again) == ConfigChanges()
    assert compare(config, again).updated == ()


def test_each_key_is_told_by_when_it_holds() -> None:
    """By dotted key, models by their ids, dots and all; sections are those of which something is taken."""
    old = Config.model_validate({"models": {"per_model": {"gone": {"pinned": True}}}})
    new = Config.model_validate(
        {
            "server": {"port": 1, "host": "::1"},
            "models": {"per_model": {"o/m-1.5": {"kv_bits": 8, "ttl_seconds": 5}}, "starter": False},
            "scheduling": {"prefix_cache": {"ram_bytes": 0, "ssd_bytes": 5}},
            "security": {"admin_key": "k"},
        }
    )
    changes = compare(old, new)
    assert changes.applied == (
        "models.per_model.gone.pinned",
        "models.per_model.o/m-1.5.ttl_seconds",
        "security.admin_key",
    )
    assert changes.at_next_load == ("models.per_model.o/m-1.5.kv_bits", "scheduling.prefix_cache.ram_bytes")
    assert changes.restart_required == (
        "server.host",
        "server.port",
        "models.starter",
        "scheduling.prefix_cache.ssd_bytes",
    )
    assert changes.updated == ("models", "security", "scheduling")


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "server": st.fixed_dictionaries({}, optional={"port": st.integers(0, 3), "drain_seconds": st.integers(0, 3)}),
        "models": st.fixed_dictionaries(
            {},
            optional={
                "models_directory": st.sampled_from(["x", "y"]),
                "aliases": st.dictionaries(st.sampled_from("ab"), st.sampled_from("cd"), max_size=2),
            },
        ),
        "scheduling": st.fixed_dictionaries(
            {},
            optional={
                "max_running": st.integers(1, 3),
                "prefix_cache": st.fixed_dictionaries(
                    {}, optional={"ram_bytes": st.integers(0, 2), "ssd_bytes": st.integers(0, 2)}
                ),
            },
        ),
    },
)


@given(SETTINGS, SETTINGS)
def test_what_is_in_force_differs_from_each_side_by_what_was_said(
    old: dict[str, object], new: dict[str, object]
) -> None:
    """From the old by what is taken, from the file by what needs a restart; a second reload takes nothing more."""
    before, read = Config.model_validate(old), Config.model_validate(new)
    changes, after = compare(before, read), in_force(before, read)
    taken = compare(before, after)
    assert (taken.applied, taken.at_next_load, taken.restart_required) == (changes.applied, changes.at_next_load, ())
    assert compare(after, read) == ConfigChanges(restart_required=changes.restart_required)
