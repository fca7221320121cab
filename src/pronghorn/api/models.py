"""/v1/models: what lines can name."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter

from pronghorn.api import wire
from pronghorn.api.auth import AccountId
from pronghorn.engines.base import EnginePool
from pronghorn.errors import NotFound


@dataclass(frozen=True, slots=True)
class ModelsApi:
    """Answers the Models API; a model counts as created when the server started."""

    engines: EnginePool
    started_at: int

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Models"])
        router.get("/v1/models")(self.list_models)
        router.get("/v1/models/{model_id:path}")(self.retrieve_model)
        return router

    async def list_models(self, _: AccountId) -> wire.ModelList:
        """Return every model that lines can name."""
        return wire.ModelList(data=[wire.model_object(model, self.started_at) for model in self.engines.models()])

    async def retrieve_model(self, model_id: str, _: AccountId) -> wire.ModelObject:
        """Return one model; its name may hold slashes and colons."""
        for model in self.engines.models():
            if model.id == model_id:
                return wire.model_object(model, self.started_at)
        raise NotFound(f"The model '{model_id}' does not exist.", param="model", code="model_not_found")
