"""Answers under a grammar, from a model with random weights: what it wants has no meaning, so the grammar must hold."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import jsonschema  # type: ignore[import-untyped]
import pytest

from opta_lmx.errors import InvalidRequest
from opta_lmx.inference.protocol import Generate, Load
from opta_lmx.inference.worker.vllm_backend import VllmBackend
from opta_lmx.types import FinishReason, LoadOptions, SamplingParams, Structured, TextPrompt
from tests.tiny_models import END_OF_TEXT, TURN_END, Family

pytestmark = pytest.mark.mlx

TinyModel: TypeAlias = Callable[[Family], Path]

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "home": {"type": "boolean"}},
            "required": ["zip", "home"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
_LIST = {"type": "array", "items": {"anyOf": [{"type": "null"}, {"const": "é"}, {"enum": [1, 2.5]}]}, "maxItems": 4}
_CHOICES = ["yes", "no", "n", 'may"be\\', "日本", "😀 naïve\n"]
_PATTERN = r"[a-c]{3}-[0-9]{2,4}(é|😀)?"
_LARK = 'start: "(" item ("," item)* ")"\nitem: /[0-9]{1,3}/ | "x"'


@dataclass(slots=True)
class Heard:
    """One answer."""

    text: str = ""
    tokens: int = 0
    finish: FinishReason | None = None
    failed: str | None = None


@dataclass(slots=True)
class Room:
    """A backend and what was heard from it."""

    backend: VllmBackend
    heard: dict[int, Heard] = field(default_factory=dict)

    def ask(self, id: int, structured: Structured | None, **sampling: Any) -> None:
        """A request at temperature 1, seeded with its id."""
        params = SamplingParams(**{"temperature": 1.0, "seed": id, "max_tokens": 200, **sampling})
        prompt = TextPrompt(f"Question {id}")
        self.heard[id] = Heard()
        self.backend.add(self.backend.prepare(Generate(id, str(id), prompt, params, structured)).compiled())

    def run(self) -> None:
        """Step until nothing is left."""
        while self.backend.has_work():
            result = self.backend.step()
            for failed in result.failed:
                self.heard[failed.id].failed = failed.message
            for id, delta in result.deltas:
                heard = self.heard[id]
                heard.text += delta.text
                heard.tokens += delta.token_count
                heard.finish = delta.finish


def _room(path: Path) -> Room:
    backend = VllmBackend()
    backend.load(Load("tiny", str(path), LoadOptions()))
    return Room(backend)


@pytest.fixture
def room(tiny_model: TinyModel) -> Room:
    """A fresh backend over the tiny llama."""
    return _room(tiny_model("llama"))


def _is_valid(wanted: Structured, text: str) -> bool:
    match wanted.kind:
        case "choice":
            return text in wanted.spec
        case "regex":
            return re.fullmatch(wanted.spec, text) is not None
        case "grammar":
            return re.fullmatch(r"\(([0-9]{1,3}|x)(,([0-9]{1,3}|x))*\)", text) is not None
        case _:
            jsonschema.validate(json.loads(text), wanted.spec)
            return True


_WANTED = [
    Structured("json_schema", _PERSON),
    Structured("json_schema", _LIST),
    Structured("regex", _PATTERN),
    Structured("choice", _CHOICES),
    Structured("grammar", _LARK),
]


def test_two_hundred_documents_follow_their_grammars(room: Room) -> None:
    """Every document that ends by itself is valid, of five kinds, side by side in one batch; and all of them end."""
    wanted = {id: _WANTED[id % len(_WANTED)] for id in range(200)}
    for id, form in wanted.items():
        room.ask(id, form)
    room.run()
    assert {heard.finish for heard in room.heard.values()} == {FinishReason.STOP}
    assert [id for id, form in wanted.items() if not _is_valid(form, room.heard[id].text)] == []


def test_a_choice_is_said_as_it_was_given(room: Room) -> None:
    """Quotes, backslashes, line ends, accents, emoji: the text is the choice, and not a way of writing it."""
    for id, choice in enumerate(_CHOICES):
        room.ask(id, Structured("choice", [choice]))
    room.run()
    assert [room.heard[id].text for id in range(len(_CHOICES))] == _CHOICES


@pytest.mark.parametrize(("bias", "text"), [(50.0, "n"), (-50.0, "no")])
def test_a_choice_that_begins_another_can_be_either(room: Room, bias: float, text: str) -> None:
    """After "n" the answer may end or go on to "no", as the model likes."""
    [letter] = room.backend.prepare(Generate(0, "0", TextPrompt("n"), SamplingParams())).token_ids
    [end] = room.backend.prepare(Generate(0, "0", TextPrompt(TURN_END), SamplingParams())).token_ids
    room.ask(1, Structured("choice", ["n", "no"]), logit_bias={letter: 100.0, end: bias})
    room.run()
    assert room.heard[1].text == text


def test_a_grammar_stays_with_its_request(room: Room) -> None:
    """Free rows beside constrained ones say what they say alone, and constrained ones what they say alone."""
    for id in range(10):
        room.ask(id, _WANTED[id % 5] if id % 2 else None, max_tokens=30)
    room.run()
    together, room.heard = room.heard, {}
    for id in range(10):
        room.ask(id, _WANTED[id % 5] if id % 2 else None, max_tokens=30)
        room.run()
    assert together == room.heard


def test_choices_of_one_request_each_have_their_place(room: Room) -> None:
    """With n = 3 every choice follows the grammar from its own beginning."""
    texts: dict[int, str] = {}
    prepared = room.backend.prepare(
        Generate(1, "1", TextPrompt("x"), SamplingParams(n=3, seed=4, max_tokens=200), _WANTED[0])
    )
    room.backend.add(prepared.compiled())
    while room.backend.has_work():
        for _, delta in room.backend.step().deltas:
            texts[delta.choice] = texts.get(delta.choice, "") + delta.text
    assert len(texts) == 3
    assert all(_is_valid(_WANTED[0], text) for text in texts.values())


def test_any_object_will_do_for_json_object(room: Room) -> None:
    """json_object asks for an object of any form: one that the model is pushed to close is closed and valid."""
    tokenizer = room.backend.prepare(Generate(0, "0", TextPrompt("}"), SamplingParams())).token_ids
    room.ask(1, Structured("json_object"), logit_bias={tokenizer[-1]: 30.0})
    room.run()
    assert json.loads(room.heard[1].text) == {}
    assert room.heard[1].finish is FinishReason.STOP


def test_greedy_and_truncated_rows_keep_to_the_grammar(room: Room) -> None:
    """The mask comes before every way of choosing: greedy, top_k 1, a tiny nucleus, penalties and biases."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 0.01},
        {"min_p": 1.0},
        {"temperature": 0.0, "frequency_penalty": 2.0, "logit_bias": {40: 100.0, 41: 100.0}},
    ]
    for id, way in enumerate(ways):
        room.ask(id, Structured("regex", _PATTERN), **way)
    room.run()
    assert all(re.fullmatch(_PATTERN, heard.text) for heard in room.heard.values())


@pytest.mark.parametrize("way", [{"min_tokens": 12}, {"min_tokens": 12, "temperature": 0.0}], ids=["sampled", "greedy"])
def test_a_finished_grammar_ends_the_answer_whatever_min_tokens_says(room: Room, way: dict[str, Any]) -> None:
    """Where the grammar allows only the end, the end comes: a minimum cannot put an impossible token in its place."""
    room.ask(1, Structured("choice", ["yes"]), **way)
    room.ask(2, Structured("choice", ["yes"]), temperature=way.get("temperature", 1.0))
    room.run()
    assert (room.heard[1].text, room.heard[1].finish) == ("yes", FinishReason.STOP)
    assert room.heard[1].tokens <= len("yes") + 1


def test_a_minimum_inside_the_grammar_is_kept(room: Room) -> None:
    """Where the grammar may end or go on, min_tokens makes it go on."""
    room.ask(1, Structured("regex", "[a-z]*"), min_tokens=10, logit_bias={2: 50.0})
    room.run()
    assert room.heard[1].tokens == 11
    assert re.fullmatch("[a-z]{10,}", room.heard[1].text)


def test_ignoring_the_end_does_not_break_the_document(room: Room) -> None:
    """With ignore_eos the tokens go on to the limit, but nothing is added to the finished text."""
    room.ask(1, Structured("choice", ["yes", "no"]), ignore_eos=True, max_tokens=20)
    room.run()
    assert room.heard[1].text in ("yes", "no")
    assert (room.heard[1].tokens, room.heard[1].failed) == (20, None)


def test_every_end_token_of_a_model_ends_a_document(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A model with two end tokens may end a finished document with either, and neither breaks the grammar."""
    path = Path(shutil.copytree(tiny_model("llama"), tmp_path / "two-ends"))
    names = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    ends = [token["id"] for token in names if token["content"] in (END_OF_TEXT, TURN_END)]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    room = _room(path)
    for id, end in enumerate(ends):
        room.ask(id, Structured("regex", "[a-c]+"), logit_bias={end: 50.0}, min_tokens=2)
    room.run()
    for heard in room.heard.values():
        assert (heard.finish, heard.failed) == (FinishReason.STOP, None)
        assert re.fullmatch("[a-c]{2,}", heard.text)


@pytest.mark.parametrize(
    ("structured", "field"),
    [
        (Structured("json_schema", {"not": {}}), "response_format"),
        (Structured("json_schema", {"type": "nope"}), "response_format"),
        (Structured("json_schema", {"$ref": "http://example.invalid/x"}), "response_format"),
        (Structured("json_schema", {"$ref": "#/definitions/none"}), "response_format"),
        (Structured("json_schema", {"type": "string", "pattern": "(?=x)"}), "response_format"),
        (Structured("json_schema", {"enum": []}), "response_format"),
        (Structured("json_schema", {"type": "array", "minItems": 5, "maxItems": 2}), "response_format"),
        (Structured("regex", "(?=a)", "structured_outputs.regex"), "structured_outputs.regex"),
        (Structured("regex", "(", "structured_outputs.regex"), "structured_outputs.regex"),
        (Structured("grammar", "junk", "structured_outputs.grammar"), "structured_outputs.grammar"),
        (Structured("grammar", "", "structured_outputs.grammar"), "structured_outputs.grammar"),
        (Structured("grammar", "start: nothing", "structured_outputs.grammar"), "structured_outputs.grammar"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(room: Room, structured: Structured, field: str) -> None:
    """Before the request takes a place, as the request's own fault, naming the field and saying why."""
    with pytest.raises(InvalidRequest, match=r"^Invalid schema for .*: .+") as caught:
        room.ask(1, structured)
    assert caught.value.param == field
    assert not room.backend.has_work()


def test_a_grammar_that_cannot_go_on_fails_in_one_line(room: Room) -> None:
    """Too deep a recursion fails its own request, with a reason that shows neither the answer nor the grammar."""
    room.ask(1, Structured("grammar", 'start: /[a-z]{40}/ tail\ntail: "secret" tail'))
    room.ask(2, Structured("choice", ["yes"]))
    room.run()
    reason = room.heard[1].failed
    assert reason is not None
    assert "\n" not in reason
    assert "secret" not in reason
    assert (room.heard[2].text, room.heard[2].failed) == ("yes", None)
