"""Chat answers as a client reads them: whole, event by event, and put together from their chunks."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.contract.conftest import CHAT


async def whole(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The answer's body."""
    response = await client.post("/v1/chat/completions", json=CHAT | fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[str]:
    """The data of every event."""
    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True} | fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


async def choices_of(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The choices of every chunk, in order; the stream must end with [DONE]."""
    *chunks, done = await streamed(client, **fields)
    assert done == "[DONE]"
    return [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]


@dataclass(slots=True)
class Assembled:
    """One choice of a stream, put together as official clients do: texts are joined, calls told apart by index."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        """Takes one chunk's choice; a call's name and id must come first and once, its index in order."""
        delta = choice["delta"]
        assert self.finish_reason is None
        self.finish_reason = choice["finish_reason"]
        self.content += delta.get("content", "")
        assert delta.get("reasoning") == delta.get("reasoning_content")
        self.reasoning += delta.get("reasoning", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call.keys() == {"index", "id", "type", "function"}
                assert call["index"] == len(self.calls)
                assert call["function"]["arguments"] == ""
                self.calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
                assert call["index"] == len(self.calls) - 1
                self.calls[-1]["function"]["arguments"] += call["function"]["arguments"]

    @property
    def message(self) -> dict[str, Any]:
        """As the whole answer's message; calls that broke off are left out there."""
        calls = [call for call in self.calls if _is_object(call["function"]["arguments"])]
        return {
            "role": "assistant",
            "content": self.content or (None if calls else ""),
            "refusal": None,
            "annotations": [],
            **({"reasoning_content": self.reasoning, "reasoning": self.reasoning} if self.reasoning else {}),
            **({"tool_calls": calls} if calls else {}),
        }


def assembled(choices: list[dict[str, Any]], index: int = 0) -> Assembled:
    """Choice ``index`` of a stream."""
    built = Assembled()
    for choice in choices:
        if choice["index"] == index:
            built.add(choice)
    return built


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
