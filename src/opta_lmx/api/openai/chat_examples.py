"""Requests to POST /v1/chat/completions for the OpenAPI document; each works with the starter as it stands."""

from typing import Final

from opta_lmx.types import JsonObject

_MODEL: Final = "smollm2-135m-instruct"
_MESSAGES: Final = [{"role": "user", "content": "What is the capital of France?"}]
_CITY: Final[JsonObject] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}

EXAMPLES: Final[dict[str, JsonObject]] = {
    "a_question": {"model": _MODEL, "messages": _MESSAGES},
    "streamed": {
        "model": _MODEL,
        "messages": [{"role": "system", "content": "Answer in one word."}, *_MESSAGES],
        "max_completion_tokens": 16,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "an_answer_of_a_form": {
        "model": _MODEL,
        "messages": _MESSAGES,
        "max_completion_tokens": 64,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": _CITY}},
    },
    "a_tool": {
        "model": _MODEL,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "max_completion_tokens": 64,
        "tools": [
            {
                "type": "function",
                "function": {"name": "get_weather", "description": "The weather now.", "parameters": _CITY},
            }
        ],
        "tool_choice": "required",
    },
}
