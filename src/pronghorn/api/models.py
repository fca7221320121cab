"""/v1/models: what lines can name."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from pronghorn.api import wire
from pronghorn.api.auth import caller
from pronghorn.engines.base import EnginePool
from pronghorn.errors import NotFound


def routes(engines: EnginePool, started_at: int) -> APIRouter:
    """Return the routes of the Models API; a model counts as created when the server started."""
    router = APIRouter(tags=["Models"])

    @router.get("/v1/models")
    async def list_models(_: Annotated[str, Depends(caller)]) -> wire.ModelList:
        """Return every model that lines can name."""
        return wire.ModelList(data=[wire.model_object(model, started_at) for model in engines.models()])

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str, _: Annotated[str, Depends(caller)]) -> wire.ModelObject:
        """Return one model; its name may hold slashes and colons."""
        for model in engines.models():
            if model.id == model_id:
                return wire.model_object(model, started_at)
        raise NotFound(f"The model '{model_id}' does not exist.", param="model", code="model_not_found")

    return router
