"""POST /v1/rerank: what the engine is asked, the order of the answer, and what is refused."""

from typing import Any

import pytest

from opta_lmx.inference.embedding import RankRequest
from tests.contract.conftest import connect
from tests.contract.encoders import make_encoder_world

RERANK = {"model": "tiny", "query": "q", "documents": ["a", {"text": "b", "id": 7}, "c"]}


async def rerank(**fields: Any) -> tuple[int, dict[str, Any], object]:
    """Status and body of an answer whose documents score 0.1, 0.9 and 0.1, and what the engine was asked."""
    world, engine = make_encoder_world()
    engine.scores = (0.1, 0.9, 0.1)
    async with connect(world) as client:
        response = await client.post("/v1/rerank", json=RERANK | fields, headers={"x-request-id": "trace"})
    return response.status_code, response.json(), engine.asked


async def test_the_most_relevant_comes_first() -> None:
    """Of equals the earlier; indexes are the request's; no key is missing, none is strange."""
    status, body, asked = await rerank()
    assert status == 200
    assert body == {
        "id": "rerank-0123abcd",
        "object": "list",
        "model": "tiny",
        "results": [
            {"index": 1, "relevance_score": 0.9},
            {"index": 0, "relevance_score": 0.1},
            {"index": 2, "relevance_score": 0.1},
        ],
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
    assert asked == RankRequest("trace", "tiny", "q", ("a", "b", "c"))


async def test_fewer_and_with_their_texts() -> None:
    """``top_n`` cuts after sorting, more than there are is all; documents come back as objects."""
    _, body, _ = await rerank(top_n=2, return_documents=True)
    assert body["results"] == [
        {"index": 1, "relevance_score": 0.9, "document": {"text": "b"}},
        {"index": 0, "relevance_score": 0.1, "document": {"text": "a"}},
    ]
    _, body, _ = await rerank(top_n=50)
    assert len(body["results"]) == 3


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"query": None}, "query", "missing_required_parameter"),
        ({"query": ""}, "query", "string_below_min_length"),
        ({"documents": []}, "documents", "empty_array"),
        ({"documents": "a"}, "documents", "invalid_type"),
        ({"documents": ["a", 5]}, "documents[1]", "invalid_type"),
        ({"documents": ["a", {}]}, "documents[1].text", "missing_required_parameter"),
        ({"documents": ["a", ""]}, "documents[1]", "string_below_min_length"),
        ({"documents": ["a"] * 2049}, "documents", "array_above_max_length"),
        ({"top_n": 0}, "top_n", "integer_below_min_value"),
        ({"model": None}, None, None),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    """And before anything is computed."""
    status, body, asked = await rerank(**fields)
    assert status == 400, body
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)
    assert asked is None
