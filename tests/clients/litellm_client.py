"""litellm as a consumer: completion, acompletion, tools, structured output, text completion, embeddings, errors."""

import asyncio
import json

import litellm
from pydantic import BaseModel, Field
from surroundings import (
    ANSWER,
    ANSWER_TOKENS,
    ECHO,
    ENCODER,
    MANY_WORDS,
    MODEL,
    PROMPT_TOKENS,
    QUESTION,
    SLOW,
    TINY,
    WEATHER_TOOL,
    check_idle,
    check_weather,
    refusal,
)

MESSAGES = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    is_capital: bool


def chat() -> None:
    """Whole, with usage, several answers and log-probabilities."""
    whole = litellm.completion(f"openai/{MODEL}", MESSAGES, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (PROMPT_TOKENS, ANSWER_TOKENS)
    several = litellm.completion(f"openai/{TINY}", MESSAGES, n=3, max_tokens=4, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(several.choices[2].logprobs.content[0].top_logprobs) == 2


async def stream() -> None:
    """A stream read to its end is the whole answer; one left early is cancelled."""
    chunks = [
        chunk
        async for chunk in await litellm.acompletion(
            f"openai/{MODEL}", MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == ANSWER_TOKENS
    many = [{"role": "user", "content": MANY_WORDS}]
    slow = await litellm.acompletion(f"openai/{SLOW}", many, stream=True)
    await anext(slow)
    await slow.aclose()
    await asyncio.to_thread(check_idle)


def tools() -> None:
    """Required and named calls, whole and streamed, and an answer of a schema's type."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        answer = litellm.completion(f"openai/{TINY}", MESSAGES, temperature=0, tools=[WEATHER_TOOL], tool_choice=choice)
        check_weather(json.loads(answer.choices[0].message.tool_calls[0].function.arguments))
        assert answer.choices[0].finish_reason == "tool_calls"
    chunks = litellm.completion(
        f"openai/{TINY}", MESSAGES, temperature=0, tools=[WEATHER_TOOL], tool_choice=named, stream=True
    )
    streamed = litellm.stream_chunk_builder(list(chunks)).choices[0].message.tool_calls[0].function
    assert streamed.arguments == answer.choices[0].message.tool_calls[0].function.arguments
    structured = litellm.completion(f"openai/{TINY}", MESSAGES, temperature=0, response_format=City)
    City.model_validate_json(structured.choices[0].message.content)


def others() -> None:
    """Text completion, embeddings, and errors under litellm's names."""
    text = litellm.text_completion("one two three", model=f"text-completion-openai/{ECHO}")
    assert text.choices[0].text == "one two three"
    embedded = litellm.embedding(f"openai/{ENCODER}", ["a ship", "a boat"])
    assert [len(item["embedding"]) for item in embedded.data] == [384, 384]
    refusal(litellm.NotFoundError, lambda: litellm.completion("openai/no-such-model", MESSAGES, max_retries=0))
    endless = [{"role": "user", "content": "w " * 5000}]
    refusal(litellm.ContextWindowExceededError, lambda: litellm.completion(f"openai/{ECHO}", endless, max_retries=0))


if __name__ == "__main__":
    chat()
    asyncio.run(stream())
    tools()
    others()
