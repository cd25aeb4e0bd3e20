"""What every client's script is told by the test that starts it, and what it may ask the server beside its client.

Imported by scripts that run in environments of their own: the standard library only.
"""

import json
import os
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

Refusal = TypeVar("Refusal", bound=Exception)

BASE_URL = os.environ["OPENAI_BASE_URL"]
MODEL = "smollm2-135m-instruct"
ENCODER = "all-minilm-l6-v2"
# Random weights: quick, and its words mean nothing, so that what is right about an answer is the server's doing.
TINY = "tiny"
# Says the words it is told.
ECHO = "echo"
# Says a thousand words, one every 50 ms.
SLOW = "slow"
MANY_WORDS = " ".join(f"w{number}" for number in range(1000))

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
# As the model's own template and tokenizer make them.
PROMPT_TOKENS, ANSWER_TOKENS = 37, 8

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city.", "parameters": WEATHER},
}


def check_weather(arguments: Any) -> None:
    """Fails unless the arguments are of the tool's schema."""
    assert set(arguments) == {"city", "unit"}, arguments
    assert isinstance(arguments["city"], str), arguments
    assert arguments["unit"] in {"celsius", "kelvin"}, arguments


def refusal(kind: type[Refusal], call: Callable[[], object]) -> Refusal:
    """The error of a call, which must fail with one of this kind."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"answered instead of {kind.__name__}: {answer}")


def check_idle() -> None:
    """Fails if a request still runs ten seconds from now; a cancelled one ends within milliseconds."""
    deadline = time.monotonic() + 10
    while (running := _requests()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running == 0


def _requests() -> Any:
    with urllib.request.urlopen(BASE_URL.removesuffix("/v1") + "/admin/status", timeout=10) as answer:
        status = json.load(answer)
    return status["requests_running"] + status["requests_waiting"]
