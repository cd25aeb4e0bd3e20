"""Names: what wins, what is refused, and what is suggested instead."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.config import ConfigError
from opta_lmx.errors import ModelNotFound
from opta_lmx.router.resolve import MAX_NAME_CHARACTERS, MAX_STEPS, check_aliases, is_name, resolve

KNOWN = ["org/big", "small", "tiny"]


def test_an_id_names_itself() -> None:
    """Also where an alias or a preset is called the same."""
    assert resolve("small", KNOWN, {"small": "tiny"}, {"small": "org/big"}) == "small"


def test_presets_come_before_aliases_and_aliases_before_globs() -> None:
    """One order, whatever else would match."""
    assert resolve("x", KNOWN, {"x": "small", "*": "tiny"}, {"x": "org/big"}) == "org/big"
    assert resolve("x", KNOWN, {"*": "tiny", "x": "small"}) == "small"
    assert resolve("y", KNOWN, {"*": "tiny", "x": "small"}) == "tiny"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-4o-mini-2024", "tiny"),
        ("gpt-4o", "small"),
        ("gpt-3", "org/big"),
        ("gpt-4?", "small"),
        ("gpt-5", "org/big"),
    ],
)
def test_the_most_specific_glob_wins(name: str, expected: str) -> None:
    """More literal characters beat fewer; the order in the file does not count."""
    aliases = {"gpt-*": "org/big", "gpt-4*": "small", "gpt-4o-mini*": "tiny"}
    assert resolve(name, KNOWN, aliases) == expected
    assert resolve(name, KNOWN, dict(reversed(aliases.items()))) == expected


def test_among_equal_globs_single_characters_beat_stars() -> None:
    """``a?`` says more than ``a*``, and a bracket counts as one character."""
    assert resolve("ab", KNOWN, {"a*": "tiny", "a?": "small"}) == "small"
    assert resolve("ab", KNOWN, {"a*": "tiny", "a[bc]": "small"}) == "small"
    assert resolve("ab", KNOWN, {"*b*": "tiny", "*b": "small"}) == "small"


def test_case_counts() -> None:
    """Ids are exact; the nearest name helps who typed it otherwise."""
    with pytest.raises(ModelNotFound) as caught:
        resolve("SMALL", KNOWN, {"sm*l": "tiny"})
    assert caught.value.nearest == ("small",)


def test_names_may_be_chained() -> None:
    """A preset may name an alias, an alias a preset or another alias."""
    assert resolve("p", KNOWN, {"a": "q", "b": "small"}, {"p": "a", "q": "b"}) == "small"


def test_a_chain_is_followed_for_so_many_steps() -> None:
    """The last allowed step still counts, one more does not, and a loop ends."""
    chain = {f"a{step}": f"a{step + 1}" for step in range(MAX_STEPS + 1)}
    assert resolve("a0", [f"a{MAX_STEPS}"], chain) == f"a{MAX_STEPS}"
    with pytest.raises(ModelNotFound):
        resolve("a0", [f"a{MAX_STEPS + 1}"], chain)
    with pytest.raises(ModelNotFound):
        resolve("x", KNOWN, {"x": "y", "y": "x"})


def test_an_alias_of_nothing_is_not_found_under_its_own_name() -> None:
    """The error names what the client asked for, not where the alias leads."""
    with pytest.raises(ModelNotFound) as caught:
        resolve("alias", KNOWN, {"alias": "gone"})
    assert caught.value.name == "alias"


def test_at_most_three_nearest_names_are_given() -> None:
    """Ids, presets and plain aliases are suggested, best first; globs are not names."""
    known = ["llama-1", "llama-2", "llama-3", "llama-4"]
    with pytest.raises(ModelNotFound) as caught:
        resolve("llama-22", known, {"llama-22b": "llama-1", "lama*": "llama-2"}, {})
    assert len(caught.value.nearest) == 3
    assert set(caught.value.nearest) <= {*known, "llama-22b"}
    assert caught.value.nearest[0] in {"llama-2", "llama-22b"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../small",
        "org/../small",
        "org//big",
        "small/",
        ".",
        "C:\\..\\small",
        "\\\\host\\share",
        "http://host/small",
        "sm\nall",
        "sm\x00all",
        "small\u202e",
        "sm\u200ball",
        "\ud800",
        "a" * (MAX_NAME_CHARACTERS + 1),
    ],
)
def test_what_is_no_name_is_never_found(name: str) -> None:
    """No path, control or invisible character and no overlong text reaches a catch-all or breaks the error."""
    assert not is_name(name)
    with pytest.raises(ModelNotFound) as caught:
        resolve(name, KNOWN, {"*": "small"})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2 * MAX_NAME_CHARACTERS


@given(
    name=st.text("ab[/.\n\u202e", max_size=6),
    aliases=st.dictionaries(st.text("ab*?[]", max_size=4), st.text("ab", max_size=3), max_size=5),
)
def test_the_answer_is_always_an_id_or_not_found(name: str, aliases: dict[str, str]) -> None:
    """Whatever the aliases are, resolving ends, and never with a name that is not known."""
    with suppress(ModelNotFound):
        assert resolve(name, ["a", "ab"], aliases) in {"a", "ab"}


@pytest.mark.parametrize(
    ("aliases", "reason"),
    [
        ({"": "small"}, "cannot be the name"),
        ({"../x": "small"}, "cannot be the name"),
        ({"x": ""}, "the name of one model"),
        ({"x": "small*"}, "the name of one model"),
        ({"x": "x"}, "circle: x -> x"),
        ({"x": "y", "y": "z", "z": "y"}, "circle: x -> y -> z -> y"),
        ({f"a{step}": f"a{step + 1}" for step in range(MAX_STEPS + 1)}, f"more than {MAX_STEPS} steps"),
    ],
)
def test_aliases_that_can_never_work_are_refused(aliases: dict[str, str], reason: str) -> None:
    """The error names the alias by its key in the configuration."""
    with pytest.raises(ConfigError, match=reason) as caught:
        check_aliases(aliases)
    assert caught.value.key == f"models.aliases.{next(iter(aliases))}"


@pytest.mark.parametrize(
    ("aliases", "presets", "key", "reason"),
    [
        ({}, {"../x": "small"}, "presets.../x", "cannot be the name"),
        ({}, {"x": "small*"}, "presets.x", "the name of one model"),
        ({}, {"x": "/etc/small"}, "presets.x", "the name of one model"),
        ({}, {"x*": "small"}, "presets.x*", "only aliases can be patterns"),
        ({}, {"x": "x"}, "presets.x", "circle: x -> x"),
        ({"y": "x"}, {"x": "y"}, "aliases.y", "circle: y -> x -> y"),
        ({"x": "tiny"}, {"x": "small"}, "aliases.x", "a preset too"),
    ],
)
def test_presets_that_can_never_work_are_refused(
    aliases: dict[str, str], presets: dict[str, str], key: str, reason: str
) -> None:
    """As aliases are; and names that hide each other, because one of them would do nothing."""
    with pytest.raises(ConfigError, match=reason) as caught:
        check_aliases(aliases, presets)
    assert caught.value.key == f"models.{key}"


def test_what_is_written_in_another_script_is_another_name() -> None:
    """Letters that look alike are not alike: the id is not found by them, and a glob takes them as it takes any."""
    for name in ("\uff53mall", "sm\u0430ll", "small\u0301", "\ufb01le"):
        with pytest.raises(ModelNotFound):
            resolve(name, [*KNOWN, "file"], {"smallest": "small", "sm*t": "tiny"})


def test_aliases_that_can_work_are_taken() -> None:
    """Also one whose target matches a glob, since the target may be an id."""
    check_aliases({"gpt-4*": "gpt-4-local", "chat": "gpt-4", "fast": "chat", "org/x": "small"}, {"terse": "fast"})
