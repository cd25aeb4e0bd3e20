"""The OpenAI Agents SDK as a consumer: whole and streamed runs, tools run by it, typed answers, handovers, errors."""

import asyncio
from typing import Annotated, Literal

import openai
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from pydantic import BaseModel, Field
from surroundings import ANSWER, ANSWER_TOKENS, ECHO, MODEL, PROMPT_TOKENS, QUESTION, TINY, refusal

GREEDY = ModelSettings(temperature=0, include_usage=True)
asked: list[tuple[str, str]] = []


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    is_capital: bool


@function_tool
def get_weather(city: Annotated[str, Field(max_length=20)], unit: Literal["celsius", "kelvin"]) -> str:
    """The weather in a city."""
    asked.append((city, unit))
    return f"290 {unit}"


def served(name: str) -> OpenAIChatCompletionsModel:
    """A model of the server, by chat completions."""
    return OpenAIChatCompletionsModel(name, openai.AsyncOpenAI(max_retries=0))


async def chat() -> None:
    """Whole and streamed, with usage."""
    agent = Agent("reader", model=served(MODEL), model_settings=GREEDY)
    whole = await Runner.run(agent, QUESTION)
    assert whole.final_output == ANSWER
    streamed = Runner.run_streamed(agent, QUESTION)
    raw = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
    assert "".join(data.delta for data in raw if data.type == "response.output_text.delta") == ANSWER
    for run in (whole, streamed):
        used = run.context_wrapper.usage
        assert (used.input_tokens, used.output_tokens) == (PROMPT_TOKENS, ANSWER_TOKENS)


async def tools() -> None:
    """A call is made, run and answered; by a name as well, and out of a stream."""
    for choice in ("required", "get_weather"):
        settings = ModelSettings(temperature=0, tool_choice=choice, parallel_tool_calls=False, max_tokens=100)
        agent = Agent("meteorologist", model=served(TINY), tools=[get_weather], model_settings=settings)
        whole = await Runner.run(agent, QUESTION)
        streamed = Runner.run_streamed(agent, QUESTION)
        async for _ in streamed.stream_events():
            pass
        # Once the tool has run the SDK asks for an answer without a choice.
        assert whole.final_output == streamed.final_output
        assert len(whole.raw_responses) == len(streamed.raw_responses) == 2
    assert len(asked) == 4
    assert all(unit in ("celsius", "kelvin") for _, unit in asked)


async def typed() -> None:
    """The answer is of the agent's type, whole and streamed."""
    agent = Agent("clerk", model=served(TINY), output_type=City, model_settings=GREEDY)
    assert isinstance((await Runner.run(agent, QUESTION)).final_output, City)
    streamed = Runner.run_streamed(agent, QUESTION)
    async for _ in streamed.stream_events():
        pass
    assert isinstance(streamed.final_output, City)


async def handover() -> None:
    """One agent calls another in; the history goes with it."""
    echo = Agent("echo", model=served(ECHO))
    settings = ModelSettings(temperature=0, tool_choice="required")
    clerk = Agent("clerk", model=served(TINY), handoffs=[echo], model_settings=settings)
    run = await Runner.run(clerk, "one two three")
    assert (run.last_agent.name, run.final_output) == ("echo", "one two three")


def unknown() -> None:
    """A name that no model has is the SDK's NotFoundError."""
    nobody = Agent("nobody", model=served("no-such-model"))
    assert refusal(openai.NotFoundError, lambda: Runner.run_sync(nobody, "Hi")).code == "model_not_found"


async def main() -> None:
    """What awaits, one after another."""
    for check in (chat, tools, typed, handover):
        await check()


if __name__ == "__main__":
    set_tracing_disabled(True)
    asyncio.run(main())
    unknown()
