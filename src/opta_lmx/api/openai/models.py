"""GET /v1/models and /v1/models/{id}: the names that requests may use."""

from collections.abc import Iterator

from starlette.requests import Request

from opta_lmx.api.openai.wire import ModelCard, ModelList
from opta_lmx.api.openapi import errors
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.errors import ModelNotFound
from opta_lmx.types import ModelFiles, ModelState

router = Router()

_GLOB = set("*?[")


@router.get("/v1/models", tags=["OpenAI"])
async def list_models(request: Request) -> ModelList:
    """Every name a request may use; only loaded models where `models.jit` is off."""
    services: Services = request.app.state.services
    services.models.refresh()
    usable = _usable(services)
    cards = [_card(model_id, files) for model_id, files in usable.items()]
    if services.config.models.jit:
        cards += [_card(name, usable[target]) for name, target in _other_names(services) if target in usable]
    return ModelList(data=cards)


# Ids contain slashes, which clients send as they are or as %2F.
@router.get("/v1/models/{model_id:path}", tags=["OpenAI"], responses=errors(404))
async def retrieve_model(model_id: str, request: Request) -> ModelCard:
    """One name a request may use."""
    services: Services = request.app.state.services
    files = _usable(services).get(services.engine.resolve(model_id))
    if files is None:
        raise ModelNotFound(model_id)
    return _card(model_id, files)


def _usable(services: Services) -> dict[str, ModelFiles]:
    """The models that would serve a request now, by id."""
    usable = {files.id: files for files in services.models.list_available() if files.problem is None}
    if services.config.models.jit:
        return usable
    loaded = {model.id for model in services.residency.snapshot() if model.state is ModelState.READY}
    return {model_id: files for model_id, files in usable.items() if model_id in loaded}


def _other_names(services: Services) -> Iterator[tuple[str, str]]:
    """Aliases and presets with the ids they stand for; a glob is no name, a name without a model is left out."""
    settings = services.config.models
    ids = {files.id for files in services.models.list_available()}
    for name in {**settings.aliases, **settings.presets}:
        if name in ids or not _GLOB.isdisjoint(name):
            continue
        try:
            yield name, services.engine.resolve(name)
        except ModelNotFound:
            continue


def _card(name: str, files: ModelFiles) -> ModelCard:
    """An alias is dated and owned as the model it stands for."""
    publisher, slash, _ = files.id.partition("/")
    return ModelCard(id=name, created=files.created, owned_by=publisher if slash else "opta-lmx")
