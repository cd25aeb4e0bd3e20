"""What is asked: prompts of a given size, no two with the same beginning, and the HTTP requests they become."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, TypeAlias

Conversation: TypeAlias = list[dict[str, str]]

# Common words: with a space in front each is one token to the tokenizers of published models and to our own.
_TEXT: Final = """
about after again all also always another answer any around ask back because been before began being best better
between big body book both boy bring build business call came can car care carry case change child city clear close
come common could country course cut day did different does done door down each early earth easy eat end enough even
every eye face fact fall family far farm father feel feet few field find fire first fish five follow food force form
found four free friend full game gave girl give good got government great green ground group grow had half hand happen
hard has head hear heart help here high him his home horse hot hour house how idea inside into island just keep kind
king know land language large last late learn leave left letter life light like line list little live long look low
made make man many map mark may mean men might mile mind money moon more morning most mother mountain move much must
name near need never new next night north nothing notice now number off often old once one only open order other our
out over own page paper part pass people perhaps person picture place plain plan plant play point power problem public
put question quick rain ran read real red rest right river road rock room round rule run said same saw say school sea
second see seem sentence set she ship short should show side simple since six size sky sleep small snow some song soon
sound south space stand star start state stay step still stone stop story street strong study such summer sun sure
table take talk teach tell ten than their them then there these thing think three time told took top toward town tree
true try turn two under until upon use very voice wait walk want war warm watch water way week well went were west what
wheel when where which while white who why wind winter with woman wonder wood word work world would write year young
"""
WORDS: Final = _TEXT.split()

GREEDY: Final[Mapping[str, Any]] = {"temperature": 0}


class Prompts:
    """A source of prompts; those of one seed are always the same."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def words(self, tokens: int) -> str:
        """So many words, which are about as many tokens."""
        return " ".join(self._random.choices(WORDS, k=tokens))

    def question(self, tokens: int) -> Conversation:
        """A short conversation of its own; half of it a system message, or templates would put in their own."""
        half = max(tokens // 2, 2)
        return self.turn(system(self.words(half)), half)

    def turn(self, before: Conversation, tokens: int) -> Conversation:
        """A conversation carried on by one more question."""
        return [*before, {"role": "user", "content": self.words(tokens)}]


def system(text: str) -> Conversation:
    """A conversation of one system message."""
    return [{"role": "system", "content": text}]


def answered(conversation: Conversation, text: str) -> Conversation:
    """A conversation with the assistant's answer."""
    return [*conversation, {"role": "assistant", "content": text}]


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat request, the same for every server; greedy, streamed and of a fixed length unless said otherwise."""

    messages: Conversation
    max_tokens: int
    stream: bool = True
    sampling: Mapping[str, Any] = field(default_factory=lambda: GREEDY)

    def to_http(self, host: str, model: str) -> bytes:
        """The whole HTTP/1.1 request."""
        body: dict[str, Any] = {
            "model": model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            **self.sampling,
        }
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return to_post(host, "/v1/chat/completions", body)


def to_post(host: str, path: str, body: Mapping[str, Any]) -> bytes:
    """A JSON POST as bytes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def to_get(host: str, path: str) -> bytes:
    """A GET as bytes."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
