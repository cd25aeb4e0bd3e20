"""What we override in and rely on from libraries whose versions are pinned: names, signatures and behaviour.

When a pin is raised, a failure here says what to look at before anything else does.
"""

import inspect
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from mlx_lm.models import cache as caches
from tokenizers.decoders import DecodeStream
from vllm_mlx.request import Request, RequestStatus, SamplingParams
from vllm_mlx.scheduler import Scheduler, SchedulerConfig
from vllm_mlx.utils.tokenizer import collect_eos_token_ids, load_model_with_fallback

from opta_lmx.inference.worker.scheduler import LmxScheduler
from tests import tiny_tokenizers

pytestmark = pytest.mark.mlx

# Methods of vllm-mlx's scheduler we override or call, with the parameters they must take.
_SCHEDULER_METHODS = {
    "__init__": ["self", "model", "tokenizer", "config"],
    "add_request": ["self", "request"],
    "has_requests": ["self"],
    "step": ["self", "max_retries"],
    "_schedule_waiting": ["self"],
    "_process_batch_responses": ["self", "responses"],
    "_process_pending_aborts": ["self"],
    "_do_abort_request": ["self", "request_id"],
}
# What stands in the books after construction: every name we read or write.
_SCHEDULER_STATE = {
    "waiting": "deque",
    "running": "dict",
    "requests": "dict",
    "finished_req_ids": "set",
    "request_id_to_uid": "dict",
    "uid_to_request_id": "dict",
    "_pending_abort_ids": "set",
    "num_requests_processed": "int",
    "batch_generator": "NoneType",
}


class Generator:
    """Stands where mlx-lm's BatchGenerator would, and records what the scheduler asks of it."""

    def __init__(self) -> None:
        self.removed: list[list[int]] = []

    def remove(self, uids: list[int]) -> None:
        """Records the uids."""
        self.removed.append(uids)


def _new_scheduler() -> Any:
    return Scheduler(object(), tiny_tokenizers.byte_level(), SchedulerConfig(enable_prefix_cache=False))


def _new_request(id: str) -> Any:
    return Request(request_id=id, prompt=[1, 2, 3], sampling_params=SamplingParams(max_tokens=5, temperature=0.0))


def test_the_pinned_versions_are_installed() -> None:
    """The overrides were written against exactly these."""
    assert (version("vllm-mlx"), version("mlx-lm")) == ("0.6.0", "0.31.3")


@pytest.mark.parametrize("name", sorted(_SCHEDULER_METHODS))
def test_the_scheduler_has_the_methods_we_override(name: str) -> None:
    """Each exists in vllm-mlx with the parameters our code passes or takes over."""
    assert list(inspect.signature(getattr(Scheduler, name)).parameters) == _SCHEDULER_METHODS[name]


def test_our_scheduler_overrides_what_it_says() -> None:
    """The methods replaced are the ones that exist above: none is an override of nothing."""
    ours = {name for name in vars(LmxScheduler) if name in vars(Scheduler)}
    assert ours == {
        "__init__",
        "__doc__",
        "__module__",
        "step",
        "has_requests",
        "_schedule_waiting",
        "_process_batch_responses",
        "_do_abort_request",
    }


def test_the_scheduler_keeps_the_books_we_use() -> None:
    """Every attribute we read or write is there from the start, of the type we take it for."""
    scheduler = _new_scheduler()
    assert {name: type(getattr(scheduler, name)).__name__ for name in _SCHEDULER_STATE} == _SCHEDULER_STATE


def test_adding_a_request_puts_it_in_line_and_nothing_more() -> None:
    """``add_request`` with token ids needs neither model nor tokenizer, and makes no batch generator."""
    scheduler, request = _new_scheduler(), _new_request("7")
    scheduler.add_request(request)
    assert list(scheduler.waiting) == [request]
    assert scheduler.requests == {"7": request}
    assert (request.status, request.num_prompt_tokens) == (RequestStatus.WAITING, 3)
    assert scheduler.batch_generator is None
    with pytest.raises(ValueError, match="already exists"):
        scheduler.add_request(_new_request("7"))


def test_an_abort_leaves_the_line_and_the_batch() -> None:
    """Deferred until it is processed: a waiting request leaves the line, a running one the generator, by its uid."""
    scheduler = _new_scheduler()
    waiting, running = _new_request("1"), _new_request("2")
    for request in (waiting, running):
        scheduler.add_request(request)
    scheduler.waiting.remove(running)
    running.status = RequestStatus.RUNNING
    scheduler.running["2"] = running
    scheduler.request_id_to_uid["2"], scheduler.uid_to_request_id[22] = 22, "2"
    scheduler.batch_generator = Generator()
    pending, process = (getattr(scheduler, name) for name in ("_pending_abort_ids", "_process_pending_aborts"))
    pending.update({"1", "2"})
    process()
    assert scheduler.batch_generator.removed == [[22]]
    assert not pending
    assert not scheduler.waiting
    assert (scheduler.running, scheduler.request_id_to_uid, scheduler.uid_to_request_id) == ({}, {}, {})
    # The request itself stays in ``requests``: whoever aborts must take it out.
    assert set(scheduler.requests) == {"1", "2"}


def test_the_loader_takes_what_we_pass() -> None:
    """Loading by path with a tokenizer configuration and a name, and the list of end tokens by tokenizer and path."""
    inspect.signature(load_model_with_fallback).bind("path", {"trust_remote_code": False}, model_id="m")
    inspect.signature(collect_eos_token_ids).bind(object(), "path")


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("KVCache", {"merge", "size", "state", "nbytes", "update_and_fetch"}),
        ("RotatingKVCache", {"merge", "size", "state", "nbytes"}),
        ("ArraysCache", {"merge", "extend", "filter", "extract", "state", "nbytes"}),
        ("BatchKVCache", {"extend", "filter", "extract", "size", "nbytes"}),
        ("BatchRotatingKVCache", {"extend", "filter", "extract", "nbytes"}),
        ("CacheList", {"merge", "extend", "filter", "extract", "state", "nbytes"}),
    ],
)
def test_mlx_lms_caches_can_be_joined_and_taken_apart(name: str, members: set[str]) -> None:
    """Rows enter a joint cache by ``merge`` and ``extend`` and leave it by ``filter`` and ``extract``."""
    assert members - set(dir(getattr(caches, name))) == set()


def test_a_row_of_a_joint_cache_lies_where_we_slice_it() -> None:
    """A batch cache is left-padded: row i holds its tokens from ``left_padding[i]`` to ``size()``, at its offset."""
    rows = []
    for length in (2, 5):
        row = caches.KVCache()
        row.update_and_fetch(mx.full((1, 1, length, 4), float(length)), mx.full((1, 1, length, 4), -float(length)))
        rows.append(row)
    joint = caches.KVCache.merge(rows)
    joint.update_and_fetch(mx.full((2, 1, 1, 4), 9.0), mx.full((2, 1, 1, 4), 9.0))
    assert (joint.left_padding.tolist(), joint.size(), joint.offset.tolist()) == ([3, 0], 6, [3, 6])
    assert joint.keys[0, 0, 3 : joint.size(), 0].tolist() == [2.0, 2.0, 9.0]
    joint.filter([0])
    assert (joint.left_padding.tolist(), joint.size()) == ([0], 3)


def test_a_recurrent_cache_keeps_a_lazy_count() -> None:
    """The padding of an ArraysCache is subtracted from lazily, which is why the batch evaluates it now and then."""
    cache = caches.ArraysCache(2, left_padding=[0, 1])
    cache.advance(3)
    assert cache.left_padding.tolist() == [-3, -2]
    assert cache.lengths is None


def test_tokenizers_streams_control_tokens_away() -> None:
    """``DecodeStream`` takes the tokenizer itself at every step, and can be told to skip control tokens."""
    tokenizer = tiny_tokenizers.word_piece()
    vocab = tokenizer.get_vocab()
    stream = DecodeStream(skip_special_tokens=True)
    ids = [vocab[tiny_tokenizers.CONTROL], vocab["hello"], vocab["##lo"]]
    assert [stream.step(tokenizer.backend_tokenizer, id) for id in ids] == [None, "hello", "lo"]


def test_llguidance_masks_and_follows() -> None:
    """A matcher copies deeply, gives a bit for each id, and refuses a token outside the grammar."""
    tokenizer = tiny_tokenizers.byte_level()
    first, second, end = (tokenizer.get_vocab()[name] for name in ("a", "b", tiny_tokenizers.CONTROL))
    table = from_tokenizer(tokenizer, n_vocab=1000, eos_token=[end])
    matcher = LLMatcher(table, LLMatcher.grammar_from_regex("a|ab"))
    copied = matcher.deep_copy()
    assert _allowed(matcher) == {first}
    assert matcher.consume_token(first)
    assert _allowed(matcher) == {second, end}
    assert matcher.consume_token(end)
    assert matcher.is_stopped()
    assert not matcher.is_error()
    assert not copied.consume_token(second)
    assert copied.is_error()
    assert copied.get_error()


def _allowed(matcher: LLMatcher) -> set[int]:
    bits = int.from_bytes(matcher.compute_bitmask(), "little")
    return {id for id in range(bits.bit_length()) if bits >> id & 1}
