"""The official OpenAI client as a consumer, sync and async, over a real socket."""

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from opta_lmx.errors import ContextTooLong, GenerationFailed, LoadFailed, QueueFull, WorkerLost
from opta_lmx.types import CacheReport, Delta, FinishReason, TokenLogprob
from tests.contract.conftest import Running
from tests.fakes import Script, text_deltas

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def sdk(running: Running) -> Iterator[openai.OpenAI]:
    """A client that does not retry."""
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_sdk(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    """The same, async."""
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_whole_answer(sdk: openai.OpenAI, running: Running) -> None:
    """Text, finish, usage with details, and the request's id arrive typed."""
    running.world.engine.script = Script(text_deltas("Hel", "lo"), cache=CacheReport(4, 4, "end"))
    completion = sdk.chat.completions.create(model="tiny", messages=MESSAGES)
    assert completion.choices[0].message.content == "Hello"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 2)
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 4
    assert completion.model_dump(exclude_unset=True) == completion.model_dump(exclude_unset=True, warnings="error")


def test_the_raw_response(sdk: openai.OpenAI) -> None:
    """Headers are reachable, and the client reads our request id as its own."""
    raw = sdk.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, extra_headers={"x-request-id": "trace-3"}
    )
    assert raw.headers["x-lmx-cache"].startswith("hit=0")
    completion = raw.parse()
    assert completion.choices[0].message.content == "Hello."
    assert raw.request_id == "trace-3"


def test_a_stream(sdk: openai.OpenAI) -> None:
    """Role first, text, finish, then usage on a chunk without choices."""
    stream = sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello."
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8


def test_the_stream_helper(sdk: openai.OpenAI, running: Running) -> None:
    """The SDK's own accumulator builds the answer from our chunks, with two choices and log-probabilities."""
    logprobs = [TokenLogprob("x", -1.0, b"x", [TokenLogprob("x", -1.0, b"x")])]
    running.world.engine.script = Script(
        [
            [Delta(0, "a", 1, None, logprobs), Delta(1, "b", 1, None, logprobs)],
            [Delta(0, "A", 1, FinishReason.STOP, logprobs), Delta(1, "B", 1, FinishReason.STOP, logprobs)],
        ]
    )
    with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1) as stream:
        completion = stream.get_final_completion()
    assert [choice.message.content for choice in completion.choices] == ["aA", "bB"]
    entries = completion.choices[1].logprobs
    assert entries is not None
    assert entries.content is not None
    assert [entry.top_logprobs[0].logprob for entry in entries.content] == [-1.0, -1.0]


async def test_async(async_sdk: openai.AsyncOpenAI) -> None:
    """Both modes work from a coroutine."""
    completion = await async_sdk.chat.completions.create(model="tiny", messages=MESSAGES)
    assert completion.choices[0].message.content == "Hello."
    stream = await async_sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello."


async def test_leaving_a_stream_early(async_sdk: openai.AsyncOpenAI, running: Running) -> None:
    """Closing the SDK's stream closes the generation."""
    running.world.engine.script = Script([[Delta(0, "a", 1)]], hangs=True)
    stream = await async_sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content == "a":
            break
    await stream.close()
    assert running.world.generation.closed.wait(5)


def test_models(sdk: openai.OpenAI) -> None:
    """Listing works, and ids with slashes can be looked up."""
    assert [model.id for model in sdk.models.list()] == ["tiny", "acme/small-4bit"]
    assert sdk.models.retrieve("acme/small-4bit").id == "acme/small-4bit"
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("tinny")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("refusal", "raised", "code"),
    [
        (ContextTooLong(9, 8), openai.BadRequestError, "context_length_exceeded"),
        (QueueFull("tiny", 9, 1), openai.RateLimitError, "rate_limit_exceeded"),
        (LoadFailed("tiny", "bad"), openai.UnprocessableEntityError, "model_load_failed"),
        (WorkerLost("tiny", "gone"), openai.InternalServerError, "worker_lost"),
    ],
)
def test_refusals_become_the_clients_errors(
    sdk: openai.OpenAI, running: Running, refusal: Exception, raised: type[openai.APIStatusError], code: str
) -> None:
    """Each with its code and message."""
    running.world.engine.script = Script(refusal=refusal)
    with pytest.raises(raised) as caught:
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert caught.value.code == code
    assert str(refusal) in caught.value.message


def test_a_bad_field_is_named(sdk: openai.OpenAI) -> None:
    """The client's exception knows the field."""
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "decimal_above_max_value")


@pytest.mark.parametrize(
    ("refusal", "attempts"), [(GenerationFailed("r"), 1), (LoadFailed("tiny", "bad"), 1)], ids=["500", "422"]
)
def test_what_waiting_cannot_cure_is_not_sent_again(
    sdk: openai.OpenAI, running: Running, refusal: Exception, attempts: int
) -> None:
    """Even a client that would retry heeds x-should-retry."""
    running.world.engine.script = Script(refusal=refusal)
    with pytest.raises(openai.APIStatusError):
        sdk.with_options(max_retries=2).chat.completions.create(model="tiny", messages=MESSAGES)
    assert len(running.world.engine.requests) == attempts


def test_a_failing_stream_raises(sdk: openai.OpenAI, running: Running) -> None:
    """The error event is an exception at the client, after the text that came before it."""
    running.world.engine.script = Script([[Delta(0, "a", 1)]], failure=WorkerLost("tiny", "gone"))
    stream = iter(sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "a"]
    with pytest.raises(openai.APIError, match="ended unexpectedly"):
        next(stream)
