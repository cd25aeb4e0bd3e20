"""What of OpenAI's chat request reaches the engine, and in which form."""

from typing import Any

import httpx
import msgspec
import pytest

from opta_lmx.types import ChatPrompt, Encoded, SamplingParams
from tests.contract.conftest import CHAT
from tests.fakes import World

USER = {"role": "user", "content": "Hi"}


async def accepted(client: httpx.AsyncClient, world: World, **fields: Any) -> tuple[SamplingParams, ChatPrompt]:
    """Sampling and prompt of the request, which must be answered."""
    response = await client.post("/v1/chat/completions", json=CHAT | fields)
    assert response.status_code == 200, response.text
    prompt = world.request.prompt
    if isinstance(prompt, Encoded):
        prompt = msgspec.msgpack.decode(b"".join(prompt.pieces), type=ChatPrompt)
    assert isinstance(prompt, ChatPrompt)
    return world.request.sampling, prompt


async def test_a_bare_request_has_the_defaults_of_the_types(client: httpx.AsyncClient, world: World) -> None:
    """Nothing is added to what the client did not say."""
    sampling, prompt = await accepted(client, world)
    assert sampling == SamplingParams()
    assert prompt == ChatPrompt([USER])
    assert world.request.model == "tiny"


async def test_every_sampling_field_arrives(client: httpx.AsyncClient, world: World) -> None:
    """Each field that is accepted is handed on under its own meaning."""
    sampling, _ = await accepted(
        client,
        world,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=-3,
        n=2,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        repetition_penalty=1.1,
        logit_bias={"50256": -100, "7": 1.5},
        logprobs=True,
        top_logprobs=3,
        min_tokens=2,
        ignore_eos=True,
        thinking_budget=9,
    )
    assert sampling == SamplingParams(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=-3,
        n=2,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        repetition_penalty=1.1,
        logit_bias={50256: -100, 7: 1.5},
        logprobs=3,
        min_tokens=2,
        ignore_eos=True,
        thinking_budget=9,
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 3}, SamplingParams(max_tokens=3)),
        ({"max_tokens": -1}, SamplingParams(max_tokens=None)),
        ({"max_completion_tokens": -1}, SamplingParams(max_tokens=None)),
        ({"max_tokens": 5.0}, SamplingParams(max_tokens=5)),
        ({"temperature": 0}, SamplingParams(temperature=0.0)),
        ({"stop": "END"}, SamplingParams(stop=("END",))),
        ({"stop": []}, SamplingParams()),
        ({"repeat_penalty": 1.2}, SamplingParams(repetition_penalty=1.2)),
        ({"repeat_penalty": 1.2, "repetition_penalty": 1.3}, SamplingParams(repetition_penalty=1.3)),
        ({"top_k": -1}, SamplingParams(top_k=0)),
        ({"logprobs": True}, SamplingParams(logprobs=0)),
        ({"logprobs": False, "top_logprobs": 0}, SamplingParams(logprobs=None)),
        ({"n": 16}, SamplingParams(n=16)),
    ],
)
async def test_spellings(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], expected: SamplingParams
) -> None:
    """Other servers' spellings and OpenAI's precedences mean what their clients mean by them."""
    assert (await accepted(client, world, **fields))[0] == expected


async def test_null_is_absent(client: httpx.AsyncClient, world: World) -> None:
    """LangChain and others write every field they know, most of them as null."""
    names = (
        "max_tokens max_completion_tokens temperature top_p top_k min_p seed n stop stop_token_ids min_tokens "
        "frequency_penalty presence_penalty repetition_penalty repeat_penalty logit_bias logprobs top_logprobs "
        "ignore_eos stream stream_options chat_template_kwargs reasoning_effort response_format tools tool_choice "
        "parallel_tool_calls thinking_budget functions function_call modalities audio metadata service_tier user store"
    )
    sampling, prompt = await accepted(client, world, **dict.fromkeys(names.split()))
    assert (sampling, prompt) == (SamplingParams(), ChatPrompt([USER]))


async def test_foreign_and_harmless_fields_are_accepted(client: httpx.AsyncClient, world: World) -> None:
    """Unknown keys are ignored on /v1, identity fields change nothing."""
    sampling, prompt = await accepted(
        client,
        world,
        ttl=5,
        options={"x": [1]},
        user="u",
        store=True,
        safety_identifier="s",
        prompt_cache_key="k",
        parallel_tool_calls=False,
        verbosity="low",
        modalities=["text"],
        prediction={"type": "content", "content": "x"},
        response_format={"type": "text"},
        tools=[],
        tool_choice="auto",
    )
    assert (sampling, prompt) == (SamplingParams(), ChatPrompt([USER]))


async def test_tools_that_must_not_be_used_are_left_out(client: httpx.AsyncClient, world: World) -> None:
    """With tool_choice none the answer is text, whatever tools are named."""
    tool = {"type": "function", "function": {"name": "f"}}
    _, prompt = await accepted(client, world, tools=[tool], tool_choice="none", functions=[], function_call="none")
    assert prompt.tools is None


async def test_template_variables_arrive(client: httpx.AsyncClient, world: World) -> None:
    """chat_template_kwargs reach the template; reasoning_effort is one of them unless the client set it there too."""
    _, prompt = await accepted(
        client, world, chat_template_kwargs={"enable_thinking": False, "x": [1]}, reasoning_effort="low"
    )
    assert prompt.template_kwargs == {"reasoning_effort": "low", "enable_thinking": False, "x": [1]}


async def test_no_effort_is_no_thinking(client: httpx.AsyncClient, world: World) -> None:
    """Effort "none" also turns the switch of templates that have only that, unless the client set it itself."""
    _, prompt = await accepted(client, world, reasoning_effort="none")
    assert prompt.template_kwargs == {"reasoning_effort": "none", "enable_thinking": False}
    world.engine.requests.clear()
    _, prompt = await accepted(
        client, world, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True, "reasoning_effort": "x"}
    )
    assert prompt.template_kwargs == {"reasoning_effort": "x", "enable_thinking": True}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "a"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "x": 1}]},
            {"role": "user", "content": "a\nb"},
        ),
        ({"role": "user", "content": "a", "name": "Ann"}, {"role": "user", "content": "a", "name": "Ann"}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": None, "refusal": None, "reasoning_content": "r", "reasoning": "s"},
            {"role": "assistant", "content": "", "reasoning_content": "r", "reasoning": "s"},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": "no"},
        ),
        (
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ),
        (
            {"role": "function", "name": "f", "content": "42"},
            {"role": "tool", "content": "42", "name": "f", "tool_call_id": "f"},
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "f", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "r"},
            {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r"},
        ),
    ],
)
async def test_messages_are_normalised(
    client: httpx.AsyncClient, world: World, message: dict[str, Any], expected: dict[str, Any]
) -> None:
    """A template sees a role, one text, and what else the client sent."""
    _, prompt = await accepted(client, world, messages=[USER, message])
    assert prompt.messages == [USER, expected]


async def test_tool_calls_in_the_history_are_carried(client: httpx.AsyncClient, world: World) -> None:
    """An agent's own earlier calls come back to it as they were."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    _, prompt = await accepted(client, world, messages=history)
    assert prompt.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


async def test_long_histories_with_repeated_roles_are_taken(client: httpx.AsyncClient, world: World) -> None:
    """Agents send thousands of messages and do not alternate roles."""
    history = [{"role": "system", "content": "s"}, USER, USER, {"role": "system", "content": "t"}] * 2500
    _, prompt = await accepted(client, world, messages=history)
    assert prompt.messages == history


async def test_the_request_id_is_the_clients(client: httpx.AsyncClient, world: World) -> None:
    """Logs of both sides can be joined."""
    response = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "trace-1"})
    assert response.headers["x-request-id"] == world.request.request_id == "trace-1"


async def test_the_body_needs_no_content_type(client: httpx.AsyncClient, world: World) -> None:
    """curl -d sends a form's content type; the body is JSON all the same."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    body = b'{"model":"tiny","messages":[{"role":"user","content":"\xc3\xa9\\ud83d\\ude00"}]}'
    response = await client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 200
    prompt = world.request.prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[0]["content"] == "é😀"
