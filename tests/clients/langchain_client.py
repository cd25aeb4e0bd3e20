"""LangChain as a consumer: chat, streams, tools, structured output, completions, embeddings, errors."""

import asyncio

import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
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
    WEATHER,
    check_idle,
    check_weather,
    refusal,
)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    is_capital: bool


@tool("get_weather", args_schema=WEATHER)
def get_weather(city: str, unit: str) -> str:
    """The weather in a city."""
    return f"{city}: 290 {unit}"


def chat(llm: ChatOpenAI) -> None:
    """Whole, streamed and with log-probabilities."""
    whole = llm.invoke(QUESTION)
    assert whole.content == ANSWER
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.response_metadata["model_name"] == MODEL
    used = whole.usage_metadata
    assert (used["input_tokens"], used["output_tokens"]) == (PROMPT_TOKENS, ANSWER_TOKENS)
    chunks = list(llm.stream(QUESTION, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["output_tokens"] == ANSWER_TOKENS
    likely = llm.bind(logprobs=True, top_logprobs=2, max_tokens=3).invoke(QUESTION)
    entries = likely.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == likely.content
    assert {len(entry["top_logprobs"]) for entry in entries} == {2}


def tools(llm: ChatOpenAI) -> None:
    """Required and named calls, whole and streamed; a tool's result goes back."""
    for choice in ("required", "get_weather"):
        bound = llm.bind_tools([get_weather], tool_choice=choice)
        called = bound.invoke("The weather in Paris?")
        check_weather(called.tool_calls[0]["args"])
    streamed = None
    for chunk in bound.stream("The weather in Paris?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"] == called.tool_calls[0]["args"]
    result = get_weather.invoke(called.tool_calls[0])
    answer = llm.bind_tools([get_weather], tool_choice="none").invoke(
        [("user", "The weather in Paris?"), called, result], max_tokens=4
    )
    assert answer.content


def structured(llm: ChatOpenAI) -> None:
    """Each of LangChain's three methods gives the schema's type."""
    for method in ("json_schema", "function_calling"):
        assert isinstance(llm.with_structured_output(City, method=method).invoke("Is Paris a capital?"), City)
    loose = llm.with_structured_output(None, method="json_mode").invoke("Say {} as json.", max_tokens=2000)
    assert isinstance(loose, dict)


async def leave_early() -> None:
    """Leaving an asynchronous stream cancels the request."""
    slow = ChatOpenAI(model=SLOW, max_retries=0)
    stream = slow.astream(MANY_WORDS)
    async for chunk in stream:
        if chunk.content:
            break
    await stream.aclose()
    # The connection is closed by the event loop, which must go on meanwhile.
    await asyncio.to_thread(check_idle)


def others() -> None:
    """Completions, several answers, embeddings, and an unknown model."""
    text = OpenAI(model=ECHO, max_retries=0, n=2, best_of=2).generate(["one two three"])
    assert [each.text for each in text.generations[0]] == ["one two three"] * 2
    assert "".join(OpenAI(model=ECHO, max_retries=0).stream("one two three")) == "one two three"
    embeddings = OpenAIEmbeddings(model=ENCODER, check_embedding_ctx_length=False, max_retries=0)
    vectors = embeddings.embed_documents(["a ship", "a boat"])
    assert [len(vector) for vector in vectors] == [384, 384]
    unknown = ChatOpenAI(model="no-such-model", max_retries=0)
    assert refusal(openai.NotFoundError, lambda: unknown.invoke("Hi")).code == "model_not_found"


if __name__ == "__main__":
    chat(ChatOpenAI(model=MODEL, temperature=0, max_retries=0))
    tiny = ChatOpenAI(model=TINY, temperature=0, max_retries=0)
    tools(tiny)
    structured(tiny)
    asyncio.run(leave_early())
    others()
