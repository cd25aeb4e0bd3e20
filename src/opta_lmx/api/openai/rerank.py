"""POST /v1/rerank, as Jina and Cohere have it: documents by how relevant they are to a query."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from opta_lmx.api.auth import caller_of
from opta_lmx.api.errors import json_response
from opta_lmx.api.openai.embeddings import while_connected
from opta_lmx.api.openai.wire_text import RerankAnswer, RerankRequest
from opta_lmx.api.openapi import MODEL_ERRORS, errors, request_body
from opta_lmx.api.parsing import understand
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.api.validation import validate_request
from opta_lmx.inference.embedding import RankRequest
from opta_lmx.types import JsonObject

router = Router()


@router.post(
    "/v1/rerank",
    tags=["Rerank"],
    responses={**errors(*MODEL_ERRORS), 200: {"model": RerankAnswer}},
    openapi_extra=request_body(
        RerankRequest,
        two_documents={
            "model": "all-minilm-l6-v2",
            "query": "What is the capital of France?",
            "documents": ["Berlin is in Germany.", "Paris is in France."],
        },
    ),
)
async def rerank(request: Request) -> Response:
    """Order documents by relevance: a cross-encoder's scores (0 to 1), or an embedding model's cosines (-1 to 1)."""
    asked = await understand(request, partial(validate_request, RerankRequest))
    services: Services = request.app.state.services
    model_id = services.engine.resolve(asked.model)
    texts = tuple(document if isinstance(document, str) else document.text for document in asked.documents)
    wanted = RankRequest(request.state.request_id, asked.model, asked.query, texts, asked.ttl, caller_of(request))
    answer = await while_connected(request.receive, lambda: services.engine.rank(wanted))
    # Of equal scores the earlier document comes first.
    best = sorted(range(len(texts)), key=lambda index: -answer.scores[index])[: asked.top_n]
    results: list[JsonObject] = [{"index": index, "relevance_score": answer.scores[index]} for index in best]
    if asked.return_documents:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    usage = {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}
    answered = {"id": f"rerank-{request.app.state.new_id()}", "object": "list", "model": model_id}
    return json_response({**answered, "results": results, "usage": usage})
