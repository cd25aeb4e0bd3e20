"""One request at a time: what the server adds to a token, and what it spares on prompts it has seen."""

from statistics import median
from typing import Final

from tests.load.bench.book import percentile
from tests.load.bench.client import Connection, connected, no_garbage_collection
from tests.load.bench.session import Bench
from tests.load.bench.targets import Target
from tests.load.bench.workload import Ask, Conversation, answered, system

# Other questions under the same system prompt, after the first one.
_FOLLOWERS: Final = 4


async def one_token(bench: Bench) -> None:
    """Whole answers of one token, one after another, by mlx-lm and over HTTP."""
    prompts = [bench.question() for _ in range(bench.profile.calls)]
    if bench.engine is not None:
        async with bench.attempt("raw", "one token"):
            _note(bench, "raw", await bench.engine.calls(prompts))
    for target in bench.turns():
        async with bench.attempt(target.name, "one token"), connected(target.host, target.port, 1) as [connection]:
            with no_garbage_collection():
                answers = [await target.ask(connection, Ask(prompt, 1, stream=False)) for prompt in prompts]
            _note(bench, target.name, [answer.seconds for answer in answers])


async def shared_prefix(bench: Bench) -> None:
    """A long system prompt: its first question, that chat's second turn, and other questions under it."""
    profile, prompts = bench.profile, bench.prompts
    briefing = system(prompts.words(profile.prefix_tokens))
    first = prompts.turn(briefing, profile.turn_tokens)
    follow_up = prompts.words(profile.turn_tokens)
    others = [prompts.turn(briefing, profile.turn_tokens) for _ in range(_FOLLOWERS)]
    if bench.engine is not None:
        async with bench.attempt("raw", "shared prefix"):
            [seconds] = await bench.engine.calls([first])
            bench.book.add("raw", "prefix_cold", seconds)
    for target in bench.turns():
        async with bench.attempt(target.name, "shared prefix"), connected(target.host, target.port, 1) as [connection]:
            cold, text = await _turn(bench, target, connection, first, "wrong_prefix")
            second = [*answered(first, text), {"role": "user", "content": follow_up}]
            warm, _ = await _turn(bench, target, connection, second, "wrong_prefix")
            later = [(await _turn(bench, target, connection, other, "wrong_prefix"))[0] for other in others]
            bench.book.add(target.name, "prefix_cold", cold)
            bench.book.add(target.name, "prefix_second", warm)
            bench.book.add(target.name, "prefix_later", median(later))


async def growing_chat(bench: Bench) -> None:
    """A chat that grows turn by turn, each with all that was said before."""
    profile, prompts = bench.profile, bench.prompts
    opening = system(prompts.words(profile.turn_tokens))
    questions = [prompts.words(profile.turn_tokens) for _ in range(profile.turns)]
    for target in bench.turns():
        async with bench.attempt(target.name, "growing chat"), connected(target.host, target.port, 1) as [connection]:
            ttfts: list[float] = []
            chat = opening
            for question in questions:
                chat = [*chat, {"role": "user", "content": question}]
                ttft, text = await _turn(bench, target, connection, chat, "wrong_chat")
                ttfts.append(ttft)
                chat = answered(chat, text)
            bench.book.add(target.name, "chat_sum", sum(ttfts))
            bench.book.add(target.name, "chat_first", ttfts[0])
            bench.book.add(target.name, "chat_last", ttfts[-1])


def _note(bench: Bench, subject: str, seconds: list[float]) -> None:
    bench.book.add(subject, "call_p50", percentile(seconds, 50))
    bench.book.add(subject, "call_p99", percentile(seconds, 99))


async def _turn(
    bench: Bench, target: Target, connection: Connection, chat: Conversation, wrong: str
) -> tuple[float, str]:
    """Seconds to the first token of a streamed answer, and its text, which is to be compared under ``wrong``."""
    ask = Ask(chat, bench.profile.turn_tokens)
    answer = await target.ask(connection, ask)
    bench.remember(target, wrong, ask, answer.text)
    return answer.ttft, answer.text
