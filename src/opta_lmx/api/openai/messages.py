"""OpenAI's messages, brought into the one form that chat templates take: a role, a text, and what else there was."""

from collections.abc import Sequence

from opta_lmx.api.openai.wire import ContentPart, Message
from opta_lmx.api.validation import missing, wrong_value
from opta_lmx.errors import UnsupportedParameter
from opta_lmx.types import JsonObject

# Parts that a text model cannot read, one of them and several; all are OpenAI's but the video.
_MEDIA = {
    "image_url": ("image", "images"),
    "input_audio": ("audio", "audio"),
    "file": ("file", "files"),
    "video_url": ("video", "videos"),
}

_ROLES = {"developer": "system", "function": "tool"}


def to_template_messages(messages: Sequence[Message], *, note_media: bool = False) -> list[JsonObject]:
    """One dict for each message, ``content`` always a string, nulls left out, OpenAI's old and rare words replaced.

    ``developer`` becomes ``system``, a ``function_call`` and its ``function`` message a tool call and its result;
    ``reasoning`` is told as ``reasoning_content``, as templates know it. With ``note_media`` the model reads in place
    of each image, audio or file that there was one.

    Raises InvalidRequest for a missing or unknown part of a message, and UnsupportedParameter for images, audio and
    files that are not noted.
    """
    return [
        _to_template_message(message, f"messages[{index}]", note_media=note_media)
        for index, message in enumerate(messages)
    ]


def _to_template_message(message: Message, param: str, *, note_media: bool) -> JsonObject:
    # An assistant's turn may hold only tool calls or reasoning; every other role speaks or is not there.
    if message.content is None and message.role != "assistant":
        raise missing(f"{param}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise missing(f"{param}.tool_call_id")
    if message.role == "function" and message.name is None:
        raise missing(f"{param}.name")
    if isinstance(message.content, list):
        # As vLLM and llama.cpp join them: parts are paragraphs, not fragments of a word.
        text = "\n".join(
            _text_of(part, f"{param}.content[{index}]", note_media=note_media)
            for index, part in enumerate(message.content)
        )
    else:
        text = message.content or ""
    rest = message.model_dump(exclude={"role", "content", "function_call"}, exclude_none=True)
    if message.function_call is not None and message.tool_calls is None:
        # In the old form a call has no id but its name.
        function = message.function_call
        rest["tool_calls"] = [{"id": function.name, "type": "function", "function": function.model_dump()}]
    if message.role == "function":
        rest.setdefault("tool_call_id", message.name)
    if "reasoning" in rest:
        rest.setdefault("reasoning_content", rest["reasoning"])
    return {"role": _ROLES.get(message.role, message.role), "content": text, **rest}


def _text_of(part: ContentPart, param: str, *, note_media: bool) -> str:
    if part.type in _MEDIA:
        one, several = _MEDIA[part.type]
        if note_media:
            return f"[{one} left out: this model reads text only]"
        raise UnsupportedParameter(f"This model reads text only and takes no {several}.", param=param)
    if part.type not in ("text", "refusal"):
        raise wrong_value(f"{param}.type", part.type, "'text', 'refusal', 'image_url', 'input_audio' and 'file'")
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise missing(f"{param}.{part.type}")
    return text
