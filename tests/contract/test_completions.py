"""POST /v1/completions: what the engine is asked, what is refused, and the answer whole and streamed."""

import json
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from opta_lmx.errors import ContextTooLong, GenerationFailed, ModelNotFound, WorkerLost
from opta_lmx.types import (
    CacheReport,
    Delta,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)
from tests.contract.conftest import Running, connect
from tests.fakes import Script, ScriptedEngine, ScriptedGeneration, World, make_world, text_deltas

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    """The answer to a completion of "Hi" by the model tiny, with some fields more."""
    return await client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", **fields})


async def whole(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The answer's body."""
    response = await post(client, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The data of every event before [DONE]."""
    response = await post(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def sampling_of(world: World, client: httpx.AsyncClient, **fields: Any) -> SamplingParams:
    """What the engine was asked to sample with."""
    await whole(client, **fields)
    return world.engine.requests[-1].sampling


# -- the request --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", [TextPrompt("Hi")]),
        (["Hi"], [TextPrompt("Hi")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2.0], [TokenPrompt([1, 2])]),
        ([[1], [2, 3]], [TokenPrompt([1]), TokenPrompt([2, 3])]),
        ("", [TextPrompt("")]),
        (None, [TextPrompt("")]),
    ],
    ids=["text", "list", "texts", "tokens", "lists-of-tokens", "empty", "null"],
)
async def test_every_form_of_prompt_is_read(
    client: httpx.AsyncClient, world: World, prompt: object, prompts: list[TextPrompt | TokenPrompt]
) -> None:
    """Each prompt is a request of its own; none at all is the beginning of a text."""
    await whole(client, prompt=prompt)
    assert [request.prompt for request in world.engine.requests] == prompts


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        (5, "prompt", "invalid_type"),
        ({}, "prompt", "invalid_type"),
        ([], "prompt", "empty_array"),
        ([[]], "prompt[0]", "empty_array"),
        (["a", 1], "prompt[1]", "invalid_type"),
        ([1, "a"], "prompt[1]", "invalid_type"),
        ([1, True], "prompt[1]", "invalid_type"),
        ([1, 1.5], "prompt[1]", "invalid_type"),
        ([1, -1], "prompt[1]", "invalid_value"),
        ([[1], [2, 2**40]], "prompt[1][1]", "invalid_value"),
        ([None], "prompt[0]", "invalid_type"),
        (["a"] * 2049, "prompt", "array_above_max_length"),
    ],
)
async def test_a_prompt_that_is_none_is_refused_by_its_place(
    client: httpx.AsyncClient, prompt: object, param: str, code: str
) -> None:
    """400 with the path of the item at fault."""
    response = await post(client, prompt=prompt)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


async def test_defaults_are_openais(client: httpx.AsyncClient, world: World) -> None:
    """16 tokens of one choice, sampled at temperature 1; nulls are as if absent."""
    assert await sampling_of(world, client) == SamplingParams(max_tokens=16)
    nulls = dict.fromkeys(("max_tokens", "n", "seed", "logprobs", "stop", "suffix", "best_of", "echo", "logit_bias"))
    assert await sampling_of(world, client, **nulls) == SamplingParams(max_tokens=16)


async def test_every_field_of_sampling_reaches_the_engine(client: httpx.AsyncClient, world: World) -> None:
    """Under the engine's names."""
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": 7, "n": 2, "best_of": 2}
    more = {"presence_penalty": 1, "frequency_penalty": -1, "repeat_penalty": 1.1, "logit_bias": {"5": -100}}
    rest = {"stop": ["x", "y"], "stop_token_ids": [3], "min_tokens": 1, "ignore_eos": True, "logprobs": 5}
    assert await sampling_of(world, client, max_tokens=-1, **given, **more, **rest) == SamplingParams(
        max_tokens=None,
        temperature=0.5,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        seed=7,
        n=2,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={5: -100},
        stop=("x", "y"),
        stop_token_ids=(3,),
        min_tokens=1,
        ignore_eos=True,
        logprobs=5,
    )
    assert (await sampling_of(world, client, stop="x")).stop == ("x",)


async def test_a_preset_fills_the_gaps() -> None:
    """What the request brings itself stays."""
    sampling = {"temperature": 0.2, "max_tokens": 99, "stop": ["END"]}
    preset = {"model": "tiny", "sampling": sampling, "context_length": 512}
    world = make_world({"models": {"presets": {"calm": preset}}})
    async with connect(world) as client:
        assert await sampling_of(world, client, model="calm", temperature=0.7) == SamplingParams(
            max_tokens=99, temperature=0.7, stop=("END",)
        )
    assert world.request.context_length == 512


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"suffix": "the end"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"best_of": 1, "n": 2}, "best_of", "unsupported_parameter"),
        ({"max_tokens": -2}, "max_tokens", "integer_below_min_value"),
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
        ({"n": 17}, "n", "integer_above_max_value"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"model": "tinny"}, "model", "model_not_found"),
        ({"model": None}, None, None),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    """And before anything is generated."""
    if code == "model_not_found":
        world.engine.script = Script(refusal=ModelNotFound("tinny"))
    response = await post(client, **fields)
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert not world.engine.generations


# -- the answer ---------------------------------------------------------------------------------------


async def test_a_whole_answer_is_openais_to_the_key(client: httpx.AsyncClient) -> None:
    """No key is missing, none is strange."""
    assert await whole(client) == {
        "id": "cmpl-0123abcd",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [{"index": 0, "text": "Hello.", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "system_fingerprint": "opta-lmx-0.1.0",
    }


async def test_a_stream_is_the_same_answer_in_pieces(client: httpx.AsyncClient, world: World) -> None:
    """Every chunk has the shape of the whole; usage comes last and is null before."""
    world.engine.script = Script(text_deltas("Hel", "lo.", finish=FinishReason.LENGTH), cache=CacheReport(4, 4, "end"))
    *chunks, last = await streamed(client, stream_options={"include_usage": True})
    head = {"id": "cmpl-0123abcd", "object": "text_completion", "created": 1_700_000_000, "model": "tiny"}
    common = head | {"system_fingerprint": "opta-lmx-0.1.0", "usage": None}
    assert chunks == [
        common | {"choices": [{"index": 0, "text": "Hel", "logprobs": None, "finish_reason": None}]},
        common | {"choices": [{"index": 0, "text": "lo.", "logprobs": None, "finish_reason": "length"}]},
    ]
    assert last["choices"] == []
    assert last["usage"] == (await whole(client))["usage"]
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
    assert all("usage" not in chunk for chunk in await streamed(client))


async def test_the_prompt_is_echoed(client: httpx.AsyncClient) -> None:
    """Before each choice's own words, in both modes; the tokens made are the model's alone."""
    body = await whole(client, prompt=["one ", "two "], n=2, echo=True)
    texts = [choice["text"] for choice in body["choices"]]
    assert [text[:4] for text in texts] == ["one ", "one ", "two ", "two "]
    assert body["usage"]["completion_tokens"] == 6
    chunks = await streamed(client, echo=True)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "HiHello."


async def test_several_prompts_are_numbered_and_summed(client: httpx.AsyncClient, world: World) -> None:
    """Choice k of prompt i is index i * n + k, in both modes, and usage counts every prompt once."""
    world.engine.script = Script(
        [[Delta(1, "b", 1, FinishReason.STOP)], [Delta(0, "a", 1, FinishReason.LENGTH)]], prompt_tokens=7
    )
    body = await whole(client, prompt=["x", "y", "z"], n=2)
    expected = [(0, "a"), (1, "b"), (2, "a"), (3, "b"), (4, "a"), (5, "b")]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == expected
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (21, 6)
    *chunks, usage = await streamed(client, prompt=["x", "y", "z"], n=2, stream_options={"include_usage": True})
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert sorted((choice["index"], choice["text"]) for choice in choices) == expected
    assert usage["usage"] == body["usage"]
    assert len({request.request_id for request in world.engine.requests[:3]}) == 3


class CountingEngine(ScriptedEngine):
    """Counts the generations open at once, and refuses the third prompt of request ``trace``."""

    entered = 0
    most_open = 0

    async def open(self, request: GenerateRequest) -> ScriptedGeneration:
        if request.request_id == "trace-2":
            raise ContextTooLong(900, 512, param="prompt")
        self.entered += 1
        closed = sum(generation.closed.is_set() for generation in self.generations)
        self.most_open = max(self.most_open, self.entered - closed)
        return await super().open(request)


def make_counting_world(settings: dict[str, Any] | None = None) -> tuple[World, CountingEngine]:
    """A world whose engine counts."""
    world = make_world(settings)
    engine = CountingEngine(world.config, world.models)
    return replace(world, engine=engine), engine


@pytest.mark.parametrize("stream", [False, True])
async def test_one_refused_prompt_refuses_the_request(stream: bool) -> None:
    """With its own status, streamed or not, and every generation that had begun is closed."""
    world, engine = make_counting_world()
    async with connect(world) as client:
        response = await client.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": ["a", "b", "c"], "stream": stream},
            headers={"x-request-id": "trace"},
        )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert engine.generations
    assert all(generation.closed.is_set() for generation in engine.generations)


@pytest.mark.parametrize("prompt", ["one", ["one", "two"]])
async def test_a_failure_after_the_start(client: httpx.AsyncClient, world: World, prompt: object) -> None:
    """Whole: its status. Streamed: what there was, one error event, and no [DONE]."""
    world.engine.script = Script([[Delta(0, "so far", 1)]], failure=WorkerLost("tiny", "signal SIGKILL"))
    assert (await post(client, prompt=prompt)).status_code == 503
    response = await post(client, prompt=prompt, stream=True)
    *events, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert any("so far" in event for event in events)
    assert "[DONE]" not in response.text
    assert all(generation.closed.is_set() for generation in world.engine.generations)


async def test_a_long_list_does_not_fill_the_queue() -> None:
    """At most as many of one request's prompts are open at once as a model runs."""
    world, engine = make_counting_world({"scheduling": {"max_running": 2}})
    async with connect(world) as client:
        body = await whole(client, prompt=[str(number) for number in range(9)])
    assert [choice["index"] for choice in body["choices"]] == list(range(9))
    assert engine.most_open == 2


async def test_log_probabilities(client: httpx.AsyncClient, world: World) -> None:
    """Offsets count characters; part of a character is named by its bytes; the chosen token is always among the top."""
    tokens = [
        TokenLogprob("né", -0.5, "né".encode(), [TokenLogprob(" a", -0.25, b" a")]),
        TokenLogprob("\ufffd", -1e9, b"\xf0\x9f", []),
        TokenLogprob("\ufffd", -1.0, b"\x98\x80", []),
        TokenLogprob("!", -2.0, b"!", []),
    ]
    looks = [[Delta(0, "né", 1, None, tokens[:1])], [Delta(0, "", 1, None, tokens[1:2])]]
    looks.append([Delta(0, "😀!", 2, FinishReason.STOP, tokens[2:])])
    world.engine.script = Script(looks)
    logprobs = (await whole(client, logprobs=1))["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["né", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"],
        "token_logprobs": [-0.5, -9999.0, -1.0, -2.0],
        "top_logprobs": [
            {" a": -0.25, "né": -0.5},
            {"bytes:\\xf0\\x9f": -9999.0},
            {"bytes:\\x98\\x80": -1.0},
            {"!": -2.0},
        ],
        "text_offset": [0, 2, 2, 3],
    }
    chunks = await streamed(client, logprobs=1)
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert {name: [item for part in parts for item in part[name]] for name in logprobs} == logprobs


_SCORED = [
    TokenLogprob("Hi", 0.0, b"Hi", []),
    TokenLogprob(" you", -1.5, b" you", [TokenLogprob(" all", -0.5, b" all")]),
]
_SAID = TokenLogprob("!", -0.25, b"!", [TokenLogprob("!", -0.25, b"!")])
_PROMPT_AND_ANSWER: dict[str, list[Any]] = {
    "tokens": ["Hi", " you", "!"],
    "token_logprobs": [None, -1.5, -0.25],
    "top_logprobs": [None, {" all": -0.5, " you": -1.5}, {"!": -0.25}],
    "text_offset": [0, 2, 6],
}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_with_log_probabilities_scores_the_prompt(
    client: httpx.AsyncClient, world: World, stream: bool
) -> None:
    """The prompt's tokens come before the answer's, the first without a probability; offsets are from its text."""
    looks = [[Delta(0, "", 0, None, _SCORED)], [Delta(0, "!", 1, FinishReason.LENGTH, [_SAID])]]
    world.engine.script = Script(looks)
    fields = {"prompt": "Hi you", "echo": True, "logprobs": 1, "max_tokens": 1}
    if stream:
        choices = [choice for chunk in await streamed(client, **fields) for choice in chunk["choices"]]
        assert [choice["text"] for choice in choices] == ["Hi you", "!"]
        parts = [choice["logprobs"] for choice in choices]
        assert {name: [item for part in parts for item in part[name]] for name in parts[0]} == _PROMPT_AND_ANSWER
    else:
        choice = (await whole(client, **fields))["choices"][0]
        assert (choice["text"], choice["logprobs"]) == ("Hi you!", _PROMPT_AND_ANSWER)
    assert world.request.sampling.prompt_logprobs == 1
    assert not world.request.sampling.echo_tokens


@pytest.mark.parametrize(("echo", "logprobs"), [(True, None), (True, 0), (False, 2), (None, None)])
async def test_a_prompt_is_scored_only_for_an_echo_with_logprobs(
    client: httpx.AsyncClient, world: World, echo: bool | None, logprobs: int | None
) -> None:
    """Scores cost more than a prompt. The text of prompts given as tokens is asked of the model's worker."""
    await whole(client, prompt=[[5, 6], [7]], echo=echo, logprobs=logprobs)
    for asked in world.engine.requests:
        wanted = (logprobs if echo else None, bool(echo))
        assert (asked.sampling.prompt_logprobs, asked.sampling.echo_tokens) == wanted


async def test_no_token_at_all_may_be_asked_for(client: httpx.AsyncClient, world: World) -> None:
    """The answer is the prompt's alone: OpenAI's way to score a text."""
    world.engine.script = Script([[Delta(0, "", 0, FinishReason.LENGTH, _SCORED)]])
    choice = (await whole(client, prompt="Hi you", echo=True, logprobs=1, max_tokens=0))["choices"][0]
    assert world.request.sampling.max_tokens == 0
    assert (choice["text"], choice["finish_reason"]) == ("Hi you", "length")
    assert choice["logprobs"] == {name: values[:2] for name, values in _PROMPT_AND_ANSWER.items()}


def test_a_client_who_leaves_closes_every_prompt(running: Running) -> None:
    """The fixture waits for each generation's end."""
    running.world.engine.script = Script([[Delta(0, "so far", 1)]], hangs=True)
    body = {"model": "tiny", "prompt": ["a", "b", "c"], "stream": True}
    with (
        httpx.Client(base_url=running.url, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert next(response.iter_lines()).startswith("data: ")
    assert len(running.world.engine.generations) == 3


# -- the official client ------------------------------------------------------------------------------


def test_the_official_client(running: Running) -> None:
    """Whole and streamed, typed, over a socket."""
    running.world.engine.script = Script(text_deltas("Hel", "lo"))
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as sdk:
        completion = sdk.completions.create(model="tiny", prompt=["a", "b"], echo=True)
        assert [choice.text for choice in completion.choices] == ["aHello", "bHello"]
        assert completion.usage is not None
        assert completion.usage.total_tokens == 14
        chunks = list(sdk.completions.create(model="tiny", prompt="a", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
        assert chunks[-1].choices[0].finish_reason == "stop"
        running.world.engine.script = Script(failure=GenerationFailed("it broke"))
        with pytest.raises(openai.APIError, match="it broke"):
            list(sdk.completions.create(model="tiny", prompt=["a", "b"], stream=True))
