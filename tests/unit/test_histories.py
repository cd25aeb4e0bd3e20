"""Conversations as clients send them, in the forms that templates take."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.inference.worker.histories import (
    histories,
    normalised,
    with_names,
    with_objects,
    with_single_calls,
    without_system,
)

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
ASSISTANT = {"role": "assistant", "content": "A"}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "call_abcdefghijkl"}


def calling(arguments: Any, content: str = "") -> dict[str, Any]:
    """An assistant's turn with one call."""
    call = {"id": "call_abcdefghijkl", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def test_the_clients_own_history_comes_first() -> None:
    """A template that takes what was sent gets what was sent, and nothing is tried twice."""
    assert next(histories([SYSTEM, USER])) == [SYSTEM, USER]
    assert list(histories([USER])) == [[USER]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": [1]}', {"a": [1]}),
        ("", {}),
        ("{}", {}),
        ("[1]", "[1]"),
        ('"text"', '"text"'),
        ('{"a": ', '{"a": '),
        ("[" * 100_000, "[" * 100_000),
        ({"a": 1}, {"a": 1}),
    ],
    ids=str,
)
def test_arguments_become_objects_where_they_are_some(text: Any, expected: Any) -> None:
    """Templates print or walk through arguments as objects; what is no object stays the text it was."""
    [message] = with_objects([calling(text)])
    assert message["tool_calls"][0]["function"]["arguments"] == expected


def test_arguments_are_also_offered_as_text() -> None:
    """Templates that join texts get a text, second."""
    first, second, *_ = histories([USER, calling("{}")])
    assert first[1]["tool_calls"][0]["function"]["arguments"] == {}
    assert second == [USER, calling("{}")]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, SYSTEM, ASSISTANT], [SYSTEM, USER, ASSISTANT]),
        ([SYSTEM, USER, SYSTEM], [{"role": "system", "content": "S\n\nS"}, USER]),
        ([USER, USER, ASSISTANT], [{"role": "user", "content": "U\n\nU"}, ASSISTANT]),
        ([USER, {"role": "assistant", "content": ""}, USER], [{"role": "user", "content": "U\n\nU"}]),
        ([USER, {"role": "assistant"}, USER], [{"role": "user", "content": "U\n\nU"}]),
        ([{"role": "system", "content": ""}, USER], [USER]),
        ([RESULT, RESULT], [{**RESULT, "tool_call_id": "defghijkl"}] * 2),
    ],
)
def test_normalised(messages: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """System first, roles alternate, nothing empty; results of tools stay apart."""
    assert normalised(messages) == expected


def test_calls_of_neighbours_are_kept() -> None:
    """Two turns of the assistant become one with the calls of both, and results still name their calls."""
    [turn, result] = normalised([calling("{}", "a"), calling("[]", "b"), RESULT])
    assert turn["content"] == "a\n\nb"
    assert [call["function"]["arguments"] for call in turn["tool_calls"]] == ["{}", "[]"]
    assert {call["id"] for call in turn["tool_calls"]} == {result["tool_call_id"]} == {"defghijkl"}


def test_a_system_message_can_open_the_users_turn() -> None:
    """For templates that know no system role."""
    assert without_system([SYSTEM, USER, ASSISTANT]) == [{"role": "user", "content": "S\n\nU"}, ASSISTANT]
    assert without_system([SYSTEM, ASSISTANT]) == [{"role": "user", "content": "S"}, ASSISTANT]
    assert without_system([SYSTEM]) == [{"role": "user", "content": "S"}]


turns = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.sampled_from(["", "x", "y"]),
    ),
    st.builds(calling, st.sampled_from(["{}", "", "no"]), st.sampled_from(["", "x"])),
)


def test_results_name_their_tool() -> None:
    """OpenAI's results name the call, which names the tool; a name that was sent stays."""
    [_, named] = with_names([calling("{}"), RESULT])
    assert named == {**RESULT, "name": "f"}
    assert with_names([calling("{}"), {**RESULT, "name": "g"}, {**RESULT, "tool_call_id": "x"}])[1:] == [
        {**RESULT, "name": "g"},
        {**RESULT, "tool_call_id": "x"},
    ]


def test_each_call_can_have_a_turn_of_its_own() -> None:
    """Followed by its result, wherever that stood; results of no call stay where they are."""
    first, second = ({"id": id, "function": {"name": id, "arguments": "{}"}} for id in "ab")
    turn = {"role": "assistant", "content": "T", "tool_calls": [first, second]}
    results = [{"role": "tool", "content": id, "tool_call_id": id} for id in "bac"]
    assert with_single_calls([turn, *results]) == [
        {"role": "assistant", "content": "T", "tool_calls": [first]},
        results[1],
        {"role": "assistant", "content": "", "tool_calls": [second]},
        results[0],
        results[2],
    ]


@given(messages=st.lists(turns, max_size=8))
def test_every_history_has_at_most_some_forms_and_no_form_twice(messages: list[dict[str, Any]]) -> None:
    """A template that takes none is given up after a few tries."""
    forms = list(histories(messages))
    assert 1 <= len(forms) <= 24
    assert all(form not in forms[:at] for at, form in enumerate(forms))


@given(messages=st.lists(turns, max_size=8))
def test_normalising_is_done_once_and_loses_no_word(messages: list[dict[str, Any]]) -> None:
    """Doing it again changes nothing, and every text that was said is still there."""
    once = normalised(messages)
    assert normalised(once) == once
    said = "".join(sorted(char for message in messages for char in message["content"]))
    assert "".join(sorted(char for message in once for char in message["content"] if char != "\n")) == said
