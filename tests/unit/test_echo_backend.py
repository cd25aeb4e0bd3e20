"""The echo backend keeps the Protocol of the worker's engines and does exactly what its options say."""

import math
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.errors import ContextTooLong, InvalidRequest, LoadFailed, UnsupportedParameter
from opta_lmx.inference.protocol import Failed, Generate, Load, Started
from opta_lmx.inference.worker.backend import Backend
from opta_lmx.inference.worker.echo_backend import EXIT_WORD, FAIL_WORD, EchoBackend, decode, encode
from opta_lmx.types import (
    ChatPrompt,
    Delta,
    EchoOptions,
    FinishReason,
    JsonObject,
    LoadOptions,
    Prompt,
    SamplingParams,
    Structured,
    TextPrompt,
    TokenPrompt,
)

_ORDERS = (FAIL_WORD, EXIT_WORD)
_TEXT = st.text(st.characters(codec="utf-8"), max_size=60).filter(lambda text: not text.startswith(_ORDERS))


class _ProcessEnded(Exception):
    """Stands for the end of the worker's process."""


def _end(code: int) -> None:
    raise _ProcessEnded(code)


def _loaded(
    echo: EchoOptions | None = None,
    options: LoadOptions | None = None,
    sleep: Callable[[float], None] = lambda seconds: None,
) -> EchoBackend:
    backend = EchoBackend(sleep=sleep, exit_process=_end)
    options = msgspec.structs.replace(options or LoadOptions(), echo=echo or EchoOptions())
    backend.load(Load("echo", "/nowhere", options))
    return backend


def _ask(backend: Backend, prompt: Prompt | str, sampling: SamplingParams | None = None, id: int = 1) -> None:
    if isinstance(prompt, str):
        prompt = ChatPrompt([{"role": "user", "content": prompt}])
    backend.add(backend.prepare(Generate(id, f"req-{id}", prompt, sampling or SamplingParams())))


def _run(backend: Backend) -> tuple[list[Started], list[tuple[int, Delta]], list[Failed]]:
    """Everything the backend makes until it has no work."""
    started: list[Started] = []
    deltas: list[tuple[int, Delta]] = []
    failed: list[Failed] = []
    while backend.has_work():
        result = backend.step()
        started += result.started
        deltas += result.deltas
        failed += result.failed
    return started, deltas, failed


def _answer(prompt: Prompt | str, sampling: SamplingParams | None = None) -> tuple[str, int, FinishReason | None]:
    """Text, token count and finish reason of one request alone."""
    backend = _loaded()
    _ask(backend, prompt, sampling)
    _, deltas, _ = _run(backend)
    return "".join(d.text for _, d in deltas), sum(d.token_count for _, d in deltas), deltas[-1][1].finish


@given(_TEXT)
def test_tokens_give_back_the_text_exactly(text: str) -> None:
    """decode(encode(text)) is the text, spaces included, and there is one token for each word."""
    assert decode(encode(text)) == text
    assert len(encode(text)) - len(text.split()) in (0, 1)


@pytest.mark.parametrize("token", [-1, 0, 2, 255, 0x02_61, 0x01_FF])
def test_an_id_no_text_has_is_refused(token: int) -> None:
    """A token prompt with an unknown id is the request's fault."""
    with pytest.raises(InvalidRequest, match=str(token)):
        _ask(_loaded(), TokenPrompt([*encode("good"), token]))


@given(_TEXT)
def test_the_answer_is_the_prompt_and_its_count_is_exact(text: str) -> None:
    """Every word comes back in order, one token a step, and the end of sequence is counted."""
    assert _answer(text) == (text, len(encode(text)) + 1, FinishReason.STOP)


@pytest.mark.parametrize("prompt", [TextPrompt("one two"), TokenPrompt(encode("one two"))])
def test_texts_and_tokens_are_echoed_as_they_stand(prompt: Prompt) -> None:
    """A raw prompt needs no template."""
    assert _answer(prompt) == ("one two", 3, FinishReason.STOP)


@pytest.mark.parametrize("prompt", [TextPrompt(""), TokenPrompt([])])
def test_a_raw_prompt_must_not_be_empty(prompt: Prompt) -> None:
    """There is no first token to predict from nothing."""
    with pytest.raises(InvalidRequest, match="empty"):
        _ask(_loaded(), prompt)


def test_a_chat_is_its_last_user_message() -> None:
    """The template drops everything but the last user's text, whether a string or parts."""
    parts = [{"type": "text", "text": "right "}, {"type": "text", "text": "one"}]
    messages: list[JsonObject] = [
        {"role": "user", "content": "wrong"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "no"},
    ]
    assert _answer(ChatPrompt(messages))[0] == "right one"


def test_max_tokens_ends_an_answer_by_length() -> None:
    """No more than max_tokens tokens are made."""
    assert _answer("a b c d", SamplingParams(max_tokens=2)) == ("a b", 2, FinishReason.LENGTH)


def test_the_end_can_be_put_off() -> None:
    """The words come round again under ignore_eos and until min_tokens."""
    assert _answer("a b", SamplingParams(ignore_eos=True, max_tokens=5)) == ("a ba ba", 5, FinishReason.LENGTH)
    assert _answer("a b", SamplingParams(min_tokens=3)) == ("a ba", 4, FinishReason.STOP)
    assert _answer("", SamplingParams(ignore_eos=True, max_tokens=2))[1:] == (2, FinishReason.LENGTH)


def test_a_stop_token_ends_the_answer_before_its_text() -> None:
    """The stop token is counted and not shown."""
    stop = tuple(encode("a b c")[1:2])
    assert _answer("a b c", SamplingParams(stop_token_ids=stop)) == ("a", 2, FinishReason.STOP)


@given(_TEXT, st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3), st.integers(1, 12))
def test_stop_strings_cut_where_they_begin(text: str, stops: list[str], max_tokens: int) -> None:
    """The first token that completes a stop string is the last, and nothing of that string is ever shown."""
    shown, made, finish = _answer(text, SamplingParams(stop=tuple(stops), max_tokens=max_tokens))
    untouched = [decode(encode(text)[:count]) for count in range(max_tokens + 1)]
    ending = next((count for count, said in enumerate(untouched) if any(stop in said for stop in stops)), None)
    if ending is None:
        assert shown == untouched[-1]
    else:
        said = untouched[ending]
        assert (made, finish) == (ending, FinishReason.STOP)
        assert shown == said[: min(said.index(stop) for stop in stops if stop in said)]


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    """A delta never shows a character a later token could turn into a stop string."""
    backend = _loaded()
    _ask(backend, "one two three", SamplingParams(stop=("two three",)))
    _, deltas, _ = _run(backend)
    assert [delta.text for _, delta in deltas] == ["one", " ", ""]


@pytest.mark.parametrize(("wanted", "expected"), [(None, []), (0, []), (3, ["hi", "hi1", "hi2"])])
def test_log_probabilities_have_the_shape_of_real_ones(wanted: int | None, expected: list[str]) -> None:
    """The chosen token heads its alternatives, which are fewer than one in sum and fall in order."""
    backend = _loaded()
    _ask(backend, "hi", SamplingParams(logprobs=wanted, max_tokens=1))
    _, [(_, delta)], _ = _run(backend)
    if wanted is None:
        assert delta.logprobs is None
        return
    assert delta.logprobs is not None
    [chosen] = delta.logprobs
    assert (chosen.token, chosen.raw) == ("hi", b"hi")
    assert [top.token for top in chosen.top] == expected
    assert [top.logprob for top in chosen.top] == sorted((top.logprob for top in chosen.top), reverse=True)
    assert sum(math.exp(top.logprob) for top in chosen.top) < 1


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_can_be_shown_and_scored(max_tokens: int) -> None:
    """Before the first token of each choice, or without any, as the real engine does."""
    backend = _loaded()
    wanted = SamplingParams(max_tokens=max_tokens, prompt_logprobs=1, logprobs=0, echo_tokens=True, n=2)
    _ask(backend, TokenPrompt(encode("one two")), wanted)
    _, deltas, _ = _run(backend)
    assert len(deltas) == 2
    for _, delta in deltas:
        said = ["one"] * max_tokens
        assert (delta.text, delta.token_count) == ("one two" + "".join(said), max_tokens)
        assert delta.finish is FinishReason.LENGTH
        assert delta.logprobs is not None
        assert [token.token for token in delta.logprobs] == ["one", " two", *said]
        assert [len(token.top) for token in delta.logprobs] == [0, 1, *(0 for _ in said)]
        assert [token.logprob for token in delta.logprobs] == [0, *[-math.log(2)] * (1 + max_tokens)]


def test_a_prompt_must_leave_room_for_one_token() -> None:
    """The refusal states both numbers; a prompt one shorter is taken and its answer clamped."""
    backend = _loaded(EchoOptions(context_length=4))
    with pytest.raises(ContextTooLong) as refusal:
        _ask(backend, "a b c d")
    assert (refusal.value.prompt_tokens, refusal.value.context_length, refusal.value.param) == (4, 4, "messages")
    _ask(backend, "a b c", SamplingParams(max_tokens=100))
    _, deltas, _ = _run(backend)
    assert [delta.finish for _, delta in deltas] == [FinishReason.LENGTH]


def test_the_server_may_shorten_the_context() -> None:
    """The smaller of the model's own context and the one the server decided holds."""
    backend = EchoBackend()
    facts = backend.load(Load("echo", "/nowhere", LoadOptions(context_length=16, echo=EchoOptions(context_length=64))))
    assert facts.context_length == 16


def test_a_grammar_is_refused() -> None:
    """An echo cannot follow one, so it does not pretend to."""
    request = Generate(1, "req-1", TextPrompt("hi"), SamplingParams(), Structured("json_object"))
    with pytest.raises(UnsupportedParameter):
        _loaded().prepare(request)


def test_each_step_gives_every_running_sequence_one_token() -> None:
    """Sequences beyond max_running wait and enter, with their Started, as soon as there is room."""
    backend = _loaded(options=LoadOptions(max_running=2))
    for id, prompt in enumerate(["a", "b b", "c"]):
        _ask(backend, prompt, id=id)
    assert backend.running() == (0, 3)
    steps = []
    while backend.has_work():
        result = backend.step()
        steps.append(([s.id for s in result.started], [id for id, _ in result.deltas], backend.running()))
    assert steps == [
        ([0, 1], [0, 1], (2, 1)),
        ([], [0, 1], (1, 1)),
        ([2], [1, 2], (1, 0)),
        ([], [2], (0, 0)),
    ]


def test_every_choice_of_a_request_is_a_sequence() -> None:
    """n choices give n answers and one Started."""
    backend = _loaded(options=LoadOptions(max_running=2))
    _ask(backend, "a b", SamplingParams(n=3))
    started, deltas, _ = _run(backend)
    assert [(s.id, s.prompt_tokens) for s in started] == [(1, 2)]
    assert ["".join(d.text for _, d in deltas if d.choice == choice) for choice in range(3)] == ["a b"] * 3
    assert [d.choice for _, d in deltas if d.finish] == [0, 1, 2]


def test_a_cancelled_request_leaves_at_the_next_step() -> None:
    """Running or waiting, each of its choices ends once; its neighbour and its own end are untouched."""
    backend = _loaded(options=LoadOptions(max_running=2))
    _ask(backend, "a b c", id=1)
    _ask(backend, "d e f", SamplingParams(n=2), id=2)
    backend.step()
    backend.cancel(2)
    deltas = backend.step().deltas
    assert [(d.choice, d.token_count) for id, d in deltas if d.finish is FinishReason.CANCELLED] == [(0, 0), (1, 0)]
    assert backend.running() == (1, 0)
    assert "".join(d.text for _, d in [*deltas, *_run(backend)[1]]) == " b c"
    backend.cancel(1)
    assert not backend.has_work()


def test_one_request_can_fail_without_its_neighbours() -> None:
    """A prompt that starts with !fail is started and fails once, whatever its choices; the others go on."""
    backend = _loaded()
    _ask(backend, "!fail please", SamplingParams(n=2), id=1)
    _ask(backend, "a", id=2)
    started, deltas, failed = _run(backend)
    assert [s.id for s in started] == [1, 2]
    assert [f.id for f in failed] == [1]
    assert [(id, d.text) for id, d in deltas] == [(2, "a"), (2, "")]


def test_a_step_takes_its_set_time() -> None:
    """token_seconds once a step; prefill in chunks, each token of the prompt once, before the first token."""
    slept: list[float] = []
    echo = EchoOptions(token_seconds=0.5, prefill_seconds_per_token=0.25, load_seconds=8.0)
    backend = _loaded(echo, LoadOptions(prefill_chunk_tokens=2), slept.append)
    _ask(backend, "a b c")
    steps = [[d.text for _, d in backend.step().deltas] for _ in range(3)]
    assert slept == [8.0, 1.0, 0.75, 0.5]
    assert steps == [[], ["a"], [" b"]]


def test_a_load_can_be_made_to_fail() -> None:
    """The reason given is the reason told."""
    with pytest.raises(LoadFailed, match="no such tensor"):
        _loaded(EchoOptions(fail_load="no such tensor"))


def test_the_process_ends_at_its_marked_token() -> None:
    """exit_at counts tokens of all requests, and the marked token is never delivered."""
    backend = _loaded(EchoOptions(exit_at=4))
    _ask(backend, "a b c", id=1)
    _ask(backend, "a b c", id=2)
    assert len(backend.step().deltas) == 2
    with pytest.raises(_ProcessEnded, match="9"):
        backend.step()


def test_a_step_can_be_made_to_hang() -> None:
    """At the marked token the step sleeps and sleeps again."""
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        if seconds:
            naps.append(seconds)
        if len(naps) == 3:
            raise _ProcessEnded

    backend = _loaded(EchoOptions(hang_at=1), sleep=sleep)
    _ask(backend, "a")
    with pytest.raises(_ProcessEnded):
        backend.step()
    assert naps == [3600, 3600, 3600]
