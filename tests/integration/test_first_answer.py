"""Two commands, one answer: the starter model and a tiny one, asked as a stranger would ask them."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Final

import anyio
import openai
import pytest
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionUserMessageParam

from opta_lmx.types import JsonObject
from tests.integration.chatting import ask, chat, connect, content, leases, model_status, status, stream
from tests.integration.conftest import RunningServer, StartServer

pytestmark = pytest.mark.mlx

STARTER: Final = "smollm2-135m-instruct"
QUESTION: Final = "What is the capital of France?"
ANSWER: Final = "The capital of France is Paris."
# As the model's own template and tokenizer make them: the system message it adds, the question, the turn's opening;
# six words, a full stop and the end of the turn.
PROMPT_TOKENS, ANSWER_TOKENS = 37, 8

MESSAGES: Final[list[ChatCompletionUserMessageParam]] = [{"role": "user", "content": QUESTION}]
PREFIX_CACHE: Final = {"prefix_cache": {"ram_bytes": "auto"}}


def check_usage(usage: JsonObject, cached_tokens: int) -> None:
    """Exactly the tokens the model saw and made."""
    assert usage["prompt_tokens"] == PROMPT_TOKENS
    assert usage["completion_tokens"] == ANSWER_TOKENS
    assert usage["total_tokens"] == PROMPT_TOKENS + ANSWER_TOKENS
    assert usage["prompt_tokens_details"]["cached_tokens"] == cached_tokens


@pytest.mark.timeout(120)
async def test_the_starter_answers_everybody_who_asks(server: StartServer, subtests: pytest.Subtests) -> None:
    """With nothing but the installation, every way of asking gets the right answer and exact counts."""
    running = server(models={"starter": True}, scheduling=PREFIX_CACHE)
    async with connect(running) as client:
        with subtests.test("whole"):
            first = await ask(client, STARTER, QUESTION, temperature=0)
            assert content(first) == ANSWER
            assert first.json()["choices"][0]["finish_reason"] == "stop"
            check_usage(first.json()["usage"], cached_tokens=0)
        with subtests.test("streamed, its prompt cached but for the last token"):
            body = chat(STARTER, QUESTION, temperature=0, stream_options={"include_usage": True})
            streamed = await stream(client, body)
            assert streamed.done
            assert streamed.text == ANSWER
            assert len(streamed.pieces) == ANSWER_TOKENS - 1
            assert streamed.finish_reasons == ["stop"]
            check_usage(streamed.events[-1]["usage"], cached_tokens=PROMPT_TOKENS - 1)
        with subtests.test("models"):
            # Beside it the encoder that comes with the tests' environment.
            cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
            assert list(cards) == ["all-minilm-l6-v2", STARTER]
            assert (await client.get(f"/v1/models/{STARTER}")).json() == cards[STARTER]
        with subtests.test("admin"):
            assert (await client.get("/admin/health")).json() == {"status": "ok", "version": "0.1.0"}
            assert (await client.get("/admin/ready")).json() == {"status": "ready"}
            shown = model_status(await status(client), STARTER)
            assert (shown["state"], shown["restarts"], shown["reason"]) == ("ready", 0, None)
            assert shown["pid"] in {child.pid for child in running.children()}
            assert await leases(client) == {STARTER: 0}
    with subtests.test("official client"):
        _ask_official(running)
    with subtests.test("official asynchronous client"):
        await _ask_official_async(running)


def _ask_official(running: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model=STARTER, messages=MESSAGES, temperature=0)
        assert answer.choices[0].message.content == ANSWER
        _check_counts(answer.usage)


async def _ask_official_async(running: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        chunks = await client.chat.completions.create(
            model=STARTER, messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
    assert text == ANSWER
    _check_counts(usage)


def _check_counts(usage: CompletionUsage | None) -> None:
    assert usage is not None
    check_usage(usage.model_dump(), cached_tokens=PROMPT_TOKENS - 1)


async def test_eight_at_once_say_what_each_says_alone(
    server: StartServer, tiny_model: Callable[..., Path], subtests: pytest.Subtests
) -> None:
    """Greedy answers do not depend on who else is in the batch, whole or streamed, whatever their lengths."""
    running = server({"tiny": tiny_model("llama")})
    asked = [
        (f"Tell me {'more and more ' * number}about harbour number {number}.", 8 + 5 * number) for number in range(8)
    ]
    async with connect(running) as client:
        alone = []
        for text, limit in asked:
            answer = await ask(client, "tiny", text, temperature=0, max_tokens=limit)
            alone.append((content(answer), answer.json()["usage"]))
        together: dict[int, tuple[str, JsonObject]] = {}

        async def once_more(number: int, text: str, limit: int) -> None:
            body = chat("tiny", text, temperature=0, max_tokens=limit)
            if number % 2:
                answer = await client.post("/v1/chat/completions", json=body)
                together[number] = content(answer), answer.json()["usage"]
            else:
                streamed = await stream(client, body | {"stream_options": {"include_usage": True}})
                assert streamed.done
                together[number] = streamed.text, streamed.events[-1]["usage"]

        async with anyio.create_task_group() as tasks:
            for number, (text, limit) in enumerate(asked):
                tasks.start_soon(once_more, number, text, limit)
    assert [together[number] for number in range(8)] == alone
    assert all(one != other for (one, _), (other, _) in pairwise(alone))
