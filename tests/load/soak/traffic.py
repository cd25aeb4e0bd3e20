"""What is sent: requests of every kind, drawn by a seed."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

# Ids of the models that ``run`` makes: two that write, one of them with a sliding window; one that echoes; an encoder.
TALKERS: Final = ("tiny-llama", "tiny-gemma")
ECHO: Final = "echo"
ENCODER: Final = "tiny-bert"
MODELS: Final = (*TALKERS, ECHO, ENCODER)

# Callers by key; the last one's requests are a batch's.
KEYS: Final = ("sk-one", "sk-two", "sk-night")
ADMIN_KEY: Final = "sk-admin"

_TEXT: Final = "the sun rose over a quiet sea and nobody had asked for it to be so bright that day"
_WORDS: Final = tuple(_TEXT.split(" "))
# Of answers with a form: a stop text would cut them, and their tokens' scores tell nothing here.
_FORMED: Final = {"max_tokens": 60, "stop": None, "logprobs": None, "top_logprobs": None}

SCHEMA: Final = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
TOOLS: Final = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]


@dataclass(frozen=True, slots=True)
class Sending:
    """One request. ``leave_after`` seconds its client closes the connection, None: never.

    ``is_sound``: it has to be answered if there is a place for it. ``raw`` are bytes to be sent as they are, instead.
    """

    kind: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    streams: bool = False
    leave_after: float | None = None
    is_sound: bool = True
    raw: bytes | None = None


def draw(rng: random.Random) -> Sending:
    """The next request of one client."""
    kinds, weights = zip(*_KINDS.items(), strict=True)
    [kind] = rng.choices(kinds, weights)
    drawn: Sending = kind(rng)
    return drawn


def _text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, most)))


def _headers(rng: random.Random) -> dict[str, str]:
    headers = {"authorization": f"Bearer {rng.choice(KEYS)}", "content-type": "application/json"}
    if rng.random() < 0.1:
        headers["x-lmx-lane"] = rng.choice(["interactive", "batch"])
    return headers


def _post(rng: random.Random, kind: str, path: str, body: Mapping[str, Any], **more: Any) -> Sending:
    return Sending(kind, path, json.dumps(body).encode(), _headers(rng), streams=bool(body.get("stream")), **more)


def _chat_body(rng: random.Random) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be short."}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(0, 2)):
        messages += [{"role": "user", "content": _text(rng, 20)}, {"role": "assistant", "content": _text(rng, 20)}]
    messages.append({"role": "user", "content": _text(rng, 60)})
    body: dict[str, Any] = {
        "model": rng.choice([*TALKERS, *TALKERS, ECHO]),
        "messages": messages,
        "max_tokens": rng.randint(1, 40),
        "stream": rng.random() < 0.6,
    }
    if rng.random() < 0.5:
        body |= {"temperature": rng.choice([0, 0.7, 1.3]), "top_p": rng.choice([0.5, 1]), "seed": rng.randrange(2**31)}
    if rng.random() < 0.2:
        body |= {"stop": ["sea"], "logprobs": True, "top_logprobs": 2}
    if rng.random() < 0.15:
        body["n"] = rng.randint(2, 3)
    return body


def _chat(rng: random.Random) -> Sending:
    return _post(rng, "chat", "/v1/chat/completions", _chat_body(rng))


def _long_chat(rng: random.Random) -> Sending:
    body = _chat_body(rng) | {"model": rng.choice(TALKERS)}
    body["messages"] = [{"role": "user", "content": " ".join(rng.choices(_WORDS, k=300))}]
    return _post(rng, "long prompt", "/v1/chat/completions", body)


def _tools(rng: random.Random) -> Sending:
    body = _chat_body(rng) | {"model": rng.choice(TALKERS), "tools": TOOLS, "tool_choice": "required"}
    return _post(rng, "tools", "/v1/chat/completions", body | _FORMED)


def _schema(rng: random.Random) -> Sending:
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    body = _chat_body(rng) | {"model": rng.choice(TALKERS), "response_format": form}
    return _post(rng, "schema", "/v1/chat/completions", body | _FORMED)


def _completion(rng: random.Random) -> Sending:
    body = {"model": rng.choice([*TALKERS, ECHO]), "prompt": _text(rng, 30), "max_tokens": rng.randint(0, 20)}
    body |= {"stream": rng.random() < 0.5, "echo": rng.random() < 0.3, "logprobs": rng.choice([None, 0, 3])}
    return _post(rng, "completion", "/v1/completions", body)


def _embeddings(rng: random.Random) -> Sending:
    texts = [_text(rng, 12) for _ in range(rng.randint(1, 6))]
    return _post(rng, "embeddings", "/v1/embeddings", {"model": ENCODER, "input": texts})


def _rerank(rng: random.Random) -> Sending:
    texts = [_text(rng, 12) for _ in range(rng.randint(1, 6))]
    return _post(rng, "rerank", "/v1/rerank", {"model": ENCODER, "query": _text(rng, 6), "documents": texts})


def _leaver(rng: random.Random) -> Sending:
    body = _chat_body(rng) | {"max_tokens": 400, "ignore_eos": True, "n": 1}
    return _post(rng, "leaver", "/v1/chat/completions", body, leave_after=rng.choice([0.0, rng.uniform(0, 0.3)]))


def _admin(rng: random.Random) -> Sending:
    headers = {"x-admin-key": ADMIN_KEY, "content-type": "application/json"}
    model = {"model_id": rng.choice(MODELS)}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/admin/models/load", model),
        ("/admin/models/unload", model | {"force": rng.random() < 0.5}),
        ("/admin/models/plan", model),
        ("/admin/leases", model | {"seconds": 0.2, "owner": "soak"}),
    ]
    looks = ["/admin/status", "/admin/memory", "/admin/metrics", "/admin/requests", "/admin/models", "/admin/health"]
    if rng.random() < 0.4:
        path, body = rng.choice(asked)
        return Sending("admin", path, json.dumps(body).encode(), headers)
    return Sending("admin", rng.choice(looks), b"", headers, method="GET")


def _corrupt(rng: random.Random) -> Sending:
    body = json.dumps(_chat_body(rng)).encode()
    chat = "/v1/chat/completions"
    at = rng.randrange(1, len(body))
    too_long = {"model": ECHO, "messages": [{"role": "user", "content": "w " * 9000}]}
    choices = [
        Sending("corrupt", chat, body[:at], _headers(rng), is_sound=False),
        Sending("corrupt", chat, body + b"}", _headers(rng), is_sound=False),
        Sending("corrupt", chat, b'{"model":' + b"[" * 500, _headers(rng), is_sound=False),
        _post(rng, "corrupt", chat, _chat_body(rng) | {"temperature": "hot"}, is_sound=False),
        _post(rng, "corrupt", chat, _chat_body(rng) | {"model": "nobody"}, is_sound=False),
        _post(rng, "corrupt", chat, too_long, is_sound=False),
        Sending("corrupt", chat, body, {"authorization": "Bearer wrong"}, is_sound=False),
        Sending("corrupt", "/v1/nothing", body, _headers(rng), is_sound=False),
        Sending("corrupt", chat, b"x" * 300_000, _headers(rng), is_sound=False),
    ]
    return rng.choice(choices)


def _broken_bytes(rng: random.Random) -> Sending:
    whole = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n" + b'{"model": 1}'
    raw = rng.choice(
        [
            rng.randbytes(rng.randint(1, 400)) + b"\r\n\r\n",
            whole[: rng.randint(1, len(whole))],
            b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            whole.replace(b"50", b"-1"),
        ]
    )
    return Sending("broken bytes", "", raw=raw, leave_after=rng.uniform(0.05, 0.4), is_sound=False)


_KINDS: Final[Mapping[Callable[[random.Random], Sending], float]] = {
    _chat: 36,
    _long_chat: 6,
    _tools: 7,
    _schema: 7,
    _completion: 8,
    _embeddings: 8,
    _rerank: 4,
    _leaver: 9,
    _admin: 8,
    _corrupt: 5,
    _broken_bytes: 2,
}
