"""Grammars made to hurt, with the real compiler: each is compiled or refused, soon, and nothing else suffers."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from opta_lmx.errors import InvalidRequest
from opta_lmx.inference.worker.grammar_trial import GrammarTrial
from opta_lmx.types import JsonObject, Structured

if TYPE_CHECKING:
    from opta_lmx.inference.worker.structured import GrammarCompiler
    from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

# Seconds: API-SPEC §2.4.
BOUND: Final = 5.0

COMPILED: Final = "compiled"

# Kept busy for minutes by llguidance 1.9.1, while it takes gigabytes.
ENDLESS: Final = {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949, 9941)]}


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def _compiler(path: Path, *bounds: float) -> "GrammarCompiler":
    from opta_lmx.inference.worker.structured import GrammarCompiler

    tokenizer = _tokenizer(path)
    return GrammarCompiler(tokenizer, len(tokenizer), [tokenizer.eos_token_id], *bounds)


@pytest.fixture
def compiler(tiny_model: "Callable[[Family], Path]") -> "GrammarCompiler":
    """A compiler for the tiny llama, with a trial process of its own."""
    return _compiler(tiny_model("llama"))


def chain(length: int, link: Callable[[JsonObject], JsonObject]) -> JsonObject:
    """Definitions of which each refers to the next."""
    links = {f"d{at}": link({"$ref": f"#/$defs/d{at - 1}"}) for at in range(1, length + 1)}
    return {"$defs": {"d0": {"type": "string"}, **links}, "$ref": f"#/$defs/d{length}"}


def nested(depth: int) -> JsonObject:
    """Objects within objects."""
    schema: JsonObject = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def named(count: int) -> JsonObject:
    """An object of so many properties."""
    names = [f"p{at}" for at in range(count)]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}


LIST: Final = {
    "$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}},
    "$ref": "#/$defs/n",
}

# What it is called -> the schema, and what becomes of it: COMPILED, or a part of the reason against it.
SCHEMAS: Final[Mapping[str, tuple[JsonObject, str]]] = {
    "remote-ref": ({"$ref": "http://127.0.0.1:9/schema"}, "Default retriever does not fetch"),
    "file-ref": ({"$ref": "file:///etc/passwd"}, "Default retriever does not fetch"),
    "relative-ref": ({"$id": "http://127.0.0.1:9/root", "$ref": "other.json"}, "Default retriever does not fetch"),
    "remote-dialect": ({"$schema": "http://127.0.0.1:9/meta"}, "Default retriever does not fetch"),
    "missing-ref": ({"$ref": "#/$defs/none"}, "does not exist"),
    "self-ref": ({"$ref": "#"}, "allows no answer"),
    "mutual-refs": (chain(1, lambda ref: ref) | {"$defs": {"d1": {"$ref": "#/$defs/d1"}}}, "allows no answer"),
    "recursive-ref": (LIST, COMPILED),
    "exploding-refs": (chain(30, lambda ref: {"type": "object", "properties": {"a": ref, "b": ref}}), COMPILED),
    "exploding-any": (chain(30, lambda ref: {"anyOf": [ref, ref]}), COMPILED),
    "exploding-all": (
        {"allOf": [{"anyOf": [{"properties": {f"{a}{b}": {}}} for b in "xy"]} for a in range(20)]},
        "schema too large",
    ),
    "long-chain": (chain(300, lambda ref: {"allOf": [ref]}), COMPILED),
    "longest-chain": (chain(5000, lambda ref: {"type": "object", "properties": {"a": ref}}), "too deeply"),
    "deep": (nested(50), COMPILED),
    "too-deep": (nested(120), "recursion limit exceeded"),
    "enum-of-10,000": ({"enum": [f"value {at}" for at in range(10_000)]}, COMPILED),
    "enum-of-100,000": ({"enum": [f"v{at}" for at in range(100_000)]}, r"too big \(limit"),
    "enum-of-a-million": ({"enum": [f"v{at}" for at in range(1_000_000)]}, "longer than 1,000,000"),
    "long-const": ({"const": "x" * 100_000}, COMPILED),
    "1,000-properties": (named(1000), COMPILED),
    "endless": (ENDLESS, "more than 2 s"),
    "nested-repeats": ({"type": "string", "pattern": "(.{1,1000}){1,1000}"}, COMPILED),
    "nested-stars": ({"type": "string", "pattern": "(a*)*b"}, COMPILED),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "back-reference": ({"type": "string", "pattern": r"(a)\1"}, "backreferences are not supported"),
    "50,000-groups": ({"type": "string", "pattern": "(" * 50_000 + "a" + ")" * 50_000}, "exceeds the nesting|nest"),
    "long-text": ({"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9}, COMPILED),
    "longest-text": ({"type": "string", "minLength": 10**18}, "decimal literal invalid"),
    "long-list": ({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}, COMPILED),
    "many-items": ({"type": "array", "items": {"type": "integer"}, "maxItems": 10**9}, COMPILED),
    "large-divisor": ({"type": "integer", "multipleOf": 10**18}, "too many digits"),
    "no-divisor": ({"type": "integer", "multipleOf": 0}, "invalid multiple"),
    "null-character": ({"enum": ["a\x00b"]}, COMPILED),
}

# The same for what is no schema: kind, text, outcome.
OTHERS: Final[Mapping[str, tuple[str, Any, str]]] = {
    "regex-repeats": ("regex", "(.{1,1000}){1,1000}", COMPILED),
    "regex-stars": ("regex", "(a*)*b", COMPILED),
    "regex-states": ("regex", "(a|b)*a(a|b){20}", COMPILED),
    "regex-brace": ("regex", "a{99999999999}", "decimal literal invalid"),
    "regex-back-reference": ("regex", r"(a)\1", "backreferences are not supported"),
    "choices": ("choice", [f"word {at}" for at in range(1000)], COMPILED),
    "long-choice": ("choice", ["z" * 2_000_000], "longer than 1,000,000"),
    "left-recursion": ("grammar", 'start: start "a" | "a"', COMPILED),
    "mutual-left-recursion": ("grammar", 'start: a\na: b "x" | "y"\nb: a', COMPILED),
    "empty-recursion": ("grammar", "start: start", "allows no answer"),
    "nothing-but-stars": ("grammar", 'start: a*\na: b*\nb: c*\nc: "x"?', COMPILED),
    "large": ("grammar", "start: " + " ".join(['"a"'] * 300_000), "longer than 1,000,000"),
    "parentheses": ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "too deeply nested"),
    "chain-of-rules": (
        "grammar",
        "start: r0\n" + "\n".join(f'r{at}: "w" r{at + 1}?' for at in range(20_000)) + '\nr20000: "x"',
        "too deeply|more than 2 s",
    ),
    "remote-schema": ("grammar", 'start: %json {"$ref": "http://127.0.0.1:9/x"}', "Default retriever does not fetch"),
    "import-of-a-file": ("grammar", '%import "/etc/passwd"\nstart: "a"', "Expected name"),
}


def check(compiler: "GrammarCompiler", wanted: Structured, outcome: str, param: str) -> None:
    """The grammar becomes what it should, within the bound."""
    began = time.monotonic()
    if outcome == COMPILED:
        compiler.compile(wanted)
    else:
        with pytest.raises(InvalidRequest, match=outcome) as caught:
            compiler.compile(wanted)
        assert caught.value.param == param
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)
    assert time.monotonic() - began < BOUND


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_compiled_or_refused_soon(compiler: "GrammarCompiler", name: str) -> None:
    """As the form of the answer and as a tool's parameters alike, by the name of its field."""
    schema, outcome = SCHEMAS[name]
    check(compiler, Structured("json_schema", schema), outcome, "response_format")
    # In a tool the same stands one level deeper, behind a property: what is open there is closed, or moved.
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}, "field": "tools[0]"}
    if not {"$ref", "$schema"} & schema.keys() and name not in ("endless", "too-deep"):
        check(compiler, Structured("tool_call", [tool], "tools"), outcome, "tools[0]")


@pytest.mark.parametrize("name", OTHERS)
def test_a_pattern_or_a_grammar_is_compiled_or_refused_soon(compiler: "GrammarCompiler", name: str) -> None:
    """Likewise what only vLLM's field can ask for."""
    kind, spec, outcome = OTHERS[name]
    field = f"structured_outputs.{kind}"
    check(compiler, Structured(kind, spec, field), outcome, field)  # type: ignore[arg-type]  # one of the kinds


@pytest.mark.parametrize("slow_looks", [1, 2])
def test_one_slow_moment_refuses_nobody(
    compiler: "GrammarCompiler", monkeypatch: pytest.MonkeyPatch, slow_looks: int
) -> None:
    """A mask has to be slow twice: a machine may stand still for a quarter of a second."""
    clock = itertools.chain([0.0, 1.0] * slow_looks, iter(time.thread_time, None))
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    outcome = COMPILED if slow_looks == 1 else r"more than 0.25 s to find"
    check(compiler, Structured("json_schema", {"const": "x"}), outcome, "response_format")


def test_of_several_tools_the_one_at_fault_is_named(compiler: "GrammarCompiler") -> None:
    """Also where only a bound is passed; where that cannot be found in time, all of them are."""
    good: JsonObject = {"type": "object", "properties": {"a": {"type": "string"}}}

    def tools(schemas: Sequence[JsonObject]) -> Structured:
        spec = [{"name": f"f{at}", "parameters": each, "field": f"tools[{at}]"} for at, each in enumerate(schemas)]
        return Structured("tool_call", spec, "tools")

    check(compiler, tools([good, {"properties": {"x": {"not": {}}}}, good]), "function 'f1': Unimplemented", "tools[1]")
    check(compiler, tools([good, {"properties": {"x": ENDLESS}}, good]), "function 'f1': it takes more", "tools[1]")
    check(compiler, tools([named(200)] * 128), "for tools: schema too large", "tools")


@pytest.mark.parametrize("lenient", [False, True])
def test_a_schema_cannot_choose_how_it_is_compiled(compiler: "GrammarCompiler", lenient: bool) -> None:
    """llguidance's own key is not obeyed: what cannot be enforced is refused, whatever the client allows."""
    schema = {"type": "string", "not": {}, "x-guidance": {"lenient": lenient}}
    check(compiler, Structured("json_schema", schema), "Unimplemented keys", "response_format")


def test_a_first_mask_that_takes_too_long_is_refused(tiny_model: "Callable[[Family], Path]") -> None:
    """It is made once before the request takes a place, to see what it costs."""
    check(_compiler(tiny_model("llama"), 0.0), Structured("regex", "[a-z ]+"), "takes more than 0 s", "response_format")


def test_a_later_mask_that_takes_too_long_ends_its_own_row(
    compiler: "GrammarCompiler", tiny_model: "Callable[[Family], Path]"
) -> None:
    """Everybody's step waited for it, so there is not another."""
    from opta_lmx.inference.worker.detokenizer import TokenTable
    from opta_lmx.inference.worker.marks import Marks
    from opta_lmx.inference.worker.structured import Grammar

    tokenizer = _tokenizer(tiny_model("llama"))
    gate = Marks(tokenizer, TokenTable(tokenizer), None, None).gate([1], or_call=False)
    row = Grammar(compiler.compile(Structured("regex", "[a-z ]+")), gate, most_mask_seconds=0.0)
    row.prepare()
    assert row.error == "its grammar takes too long to follow"


# -- the trial --------------------------------------------------------------------------------------

ENDLESS_GRAMMAR: Final = str({"grammars": [{"json_schema": ENDLESS}]}).replace("'", '"')
PLAIN: Final = 'start: "a"'


@pytest.mark.parametrize(
    ("grammar", "seconds", "mebibytes", "fault"),
    [
        (ENDLESS_GRAMMAR, 0.3, 512, "more than 0.3 s"),
        (ENDLESS_GRAMMAR, 3.0, 64, "more than 64 MiB"),
        (
            "start: r0\n" + "\n".join(f'r{at}: "w" r{at + 1}?' for at in range(9000)) + '\nr9000: "x"',
            3.0,
            512,
            "deeply",
        ),
    ],
    ids=["time", "memory", "stack"],
)
def test_a_trial_ends_at_its_bounds(
    grammar: str, seconds: float, mebibytes: int, fault: str, children: Callable[[], set[psutil.Process]]
) -> None:
    """Time, memory and stack: the process is lost, the next grammar gets another, and none is left behind."""
    trial = GrammarTrial(mebibytes * 1024**2)
    assert fault in (trial.fault(grammar, seconds) or "")
    assert trial.fault(PLAIN) is None
    assert len(children()) == 1
    del trial
    assert children() == set()


def test_a_trial_that_was_killed_is_started_again(children: Callable[[], set[psutil.Process]]) -> None:
    """Somebody else may end the process while it is idle; the next grammar does not suffer for it."""
    trial = GrammarTrial()
    assert trial.fault(PLAIN) is None
    [process] = children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert trial.fault(PLAIN) is None
