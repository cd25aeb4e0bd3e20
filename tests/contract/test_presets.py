"""A preset fills what a request leaves open, and never overrules it."""

from typing import Any

import pytest

from opta_lmx.api.openai.chat import to_generate_request
from opta_lmx.api.openai.wire import ChatRequest
from opta_lmx.api.validation import validate
from opta_lmx.config_models import Preset, PresetSampling
from opta_lmx.errors import InvalidRequest, UnsupportedParameter
from opta_lmx.types import ChatPrompt, GenerateRequest

PRESET = Preset(
    model="m",
    system_prompt="Be brief.",
    sampling=PresetSampling(temperature=0.5, max_tokens=7, stop=("END",), repetition_penalty=1.1),
    template_kwargs={"enable_thinking": False},
    context_length=100,
    tool_format="mistral",
    reasoning_format="none",
)
USER = {"role": "user", "content": "x"}


def asked(**fields: Any) -> GenerateRequest:
    """A request over PRESET."""
    return to_generate_request(validate(ChatRequest, {"model": "p", "messages": [USER], **fields}), "r", PRESET)


def test_gaps_are_filled() -> None:
    """A bare request gets everything the preset sets."""
    wanted = asked()
    assert wanted.prompt == ChatPrompt(
        [{"role": "system", "content": "Be brief."}, USER], template_kwargs={"enable_thinking": False}
    )
    sampling = wanted.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0.5, 7, ("END",))
    assert (sampling.repetition_penalty, wanted.context_length) == (1.1, 100)
    assert (wanted.tool_format, wanted.reasoning_format) == ("mistral", "none")


def test_own_values_win() -> None:
    """Whatever the request says itself stays, under any of its spellings."""
    own_system = {"role": "system", "content": "Sing."}
    wanted = asked(
        messages=[own_system, USER],
        temperature=0,
        max_completion_tokens=3,
        stop="X",
        repeat_penalty=1.3,
        chat_template_kwargs={"enable_thinking": True},
    )
    assert wanted.prompt == ChatPrompt([own_system, USER], template_kwargs={"enable_thinking": True})
    sampling = wanted.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0, 3, ("X",))
    assert sampling.repetition_penalty == 1.3


def test_media_are_noted_where_the_preset_says_so() -> None:
    """Of an image, audio, a file, a video the model reads that there was one, in its place; else they are refused."""
    parts = [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "text", "text": "And?"},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA=="}},
    ]
    asked_with = validate(ChatRequest, {"model": "p", "messages": [{"role": "user", "content": parts}]})
    noted = to_generate_request(asked_with, "r", Preset(model="m", media="note"))
    assert isinstance(noted.prompt, ChatPrompt)
    assert noted.prompt.messages[0]["content"].split("\n") == [
        "Look:",
        "[image left out: this model reads text only]",
        "[audio left out: this model reads text only]",
        "And?",
        "[file left out: this model reads text only]",
        "[video left out: this model reads text only]",
    ]
    for preset in (None, Preset(model="m")):
        with pytest.raises(UnsupportedParameter) as refused:
            to_generate_request(asked_with, "r", preset)
        assert refused.value.param == "messages[0].content[1]"


def test_an_unknown_part_is_never_noted() -> None:
    """A preset that notes media still refuses what nobody knows."""
    message = {"role": "user", "content": [{"type": "smell", "smell": "rose"}]}
    asked_with = validate(ChatRequest, {"model": "p", "messages": [message]})
    with pytest.raises(InvalidRequest) as refused:
        to_generate_request(asked_with, "r", Preset(model="m", media="note"))
    assert refused.value.param == "messages[0].content[0].type"
