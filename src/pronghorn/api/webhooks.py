"""/v1/webhook_endpoints: who is told when a batch ends. OpenAI's API, and a log of deliveries as an extension."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, field_validator

from pronghorn.api import wire
from pronghorn.api.auth import AccountId
from pronghorn.clock import Clock
from pronghorn.domain.addresses import AllowedHosts, Refused, judge_url
from pronghorn.domain.webhooks import Delivery, DeliveryState, Event, EventType, NoReply, Reply, WebhookEndpoint
from pronghorn.errors import InvalidRequest, NotFound
from pronghorn.ids import Ids
from pronghorn.storage.webhooks import ENDPOINTS_PER_ACCOUNT_MAX, Webhooks

# Standard Webhooks asks for 24 to 64 bytes.
SECRET_BYTES = 32
KEEP_OLD_SECRET_S = 24 * 3600
NAME_CHARS_MAX = 256
URL_CHARS_MAX = 2048
# What a test event names: the shape of a batch's id, and no batch's.
TEST_BATCH_ID = "batch_" + "0" * 32

Send = Callable[[WebhookEndpoint, Event, str], Awaitable[Reply | NoReply]]


class WebhookEndpointObject(wire.Identified):
    """Where an account's events go; `disabled_at` is when the receiver answered 410 Gone."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int | None
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str | None
    disabled_at: int | None


class WebhookEndpointWithSecret(WebhookEndpointObject):
    """An endpoint whose signing secret is new; it is shown this once."""

    signing_secret: str


class WebhookEndpointList(wire.Page[WebhookEndpointObject]):
    """One page of endpoints, newest first."""


class DeletedWebhookEndpoint(BaseModel):
    """The endpoint that is no more."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class WebhookEndpointTestResult(BaseModel):
    """What the receiver of a test event answered; `success` is that it answered at all."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class WebhookEventTypeList(BaseModel):
    """Every event that an endpoint can be told."""

    object: Literal["list"] = "list"
    data: list[str]


class WebhookDeliveryObject(wire.Identified):
    """One event on its way to one endpoint; `id` is the receiver's `webhook-id`."""

    object: Literal["webhook_delivery"] = "webhook_delivery"
    webhook_endpoint_id: str
    event_id: str
    event_type: str
    batch_id: str
    created_at: int
    state: DeliveryState
    attempts: int
    last_status_code: int | None
    last_error: str | None
    next_attempt_at: int | None
    delivered_at: int | None


class WebhookDeliveryList(wire.Page[WebhookDeliveryObject]):
    """One page of deliveries, newest first."""


class _Request(wire.Request):
    @field_validator("event_types", check_fields=False)
    @classmethod
    def _are_known(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(wire.one_of(EventType, event_type) for event_type in value))


_Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
_Url = Annotated[str, Field(max_length=URL_CHARS_MAX, json_schema_extra={"format": "uri"})]
_EventType = Annotated[str, Field(json_schema_extra={"enum": [event_type.value for event_type in EventType]})]
_EventTypes = Annotated[list[_EventType], Field(min_length=1)]


class CreateWebhookEndpoint(_Request):
    """A new endpoint."""

    name: _Name
    url: _Url
    event_types: _EventTypes


class UpdateWebhookEndpoint(_Request):
    """What is to change; `event_types` replaces the whole set, and any `url` enables a disabled endpoint."""

    name: _Name = Field(default_factory=str)
    url: _Url = Field(default_factory=str)
    event_types: _EventTypes = Field(default_factory=list)


class RotateWebhookSecret(_Request):
    """Whether receivers get a day in which either secret verifies."""

    keep_old_secret_active_for_24_hours: bool = False


class SendTestEvent(_Request):
    """Which event to send as a test."""

    event_type: _EventType

    @field_validator("event_type")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return wire.one_of(EventType, value)


@dataclass(frozen=True, slots=True)
class WebhooksApi:
    """Answers the API of webhooks; `send` makes one attempt to bring an event to an endpoint."""

    webhooks: Webhooks
    clock: Clock
    ids: Ids
    allowed: AllowedHosts
    send: Send

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Webhooks"])
        router.post("/v1/webhook_endpoints")(self.create_webhook_endpoint)
        router.get("/v1/webhook_endpoints")(self.list_webhook_endpoints)
        router.get("/v1/webhook_endpoints/{webhook_endpoint_id}")(self.retrieve_webhook_endpoint)
        router.post("/v1/webhook_endpoints/{webhook_endpoint_id}")(self.update_webhook_endpoint)
        router.delete("/v1/webhook_endpoints/{webhook_endpoint_id}")(self.delete_webhook_endpoint)
        router.post("/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")(self.rotate_webhook_secret)
        router.post("/v1/webhook_endpoints/{webhook_endpoint_id}/test")(self.test_webhook_endpoint)
        router.get("/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries")(self.list_webhook_deliveries)
        router.get("/v1/webhook_event_types")(self.list_webhook_event_types)
        return router

    async def create_webhook_endpoint(
        self, body: CreateWebhookEndpoint, account_id: AccountId
    ) -> WebhookEndpointWithSecret:
        """Make an endpoint and show its signing secret."""
        _check_url(body.url, self.allowed)
        now = self.clock.now()
        endpoint = WebhookEndpoint(
            id=self.ids.new("whe_"),
            account_id=account_id,
            name=body.name,
            url=body.url,
            event_types=tuple(map(EventType, body.event_types)),
            secret=_new_secret(),
            created_at=now,
            updated_at=now,
        )
        if not await self.webhooks.add_endpoint(endpoint):
            raise InvalidRequest(
                f"There are {ENDPOINTS_PER_ACCOUNT_MAX} webhook endpoints already, which is the most there can be.",
                code="webhook_endpoint_limit_exceeded",
            )
        return _with_secret(endpoint)

    async def list_webhook_endpoints(
        self,
        account_id: AccountId,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> WebhookEndpointList:
        """Return a page of endpoints, newest first; the next page starts `after` the last id of this one."""
        page = await self.webhooks.list_endpoints(account_id, limit=limit, after=after)
        if page is None:
            raise NotFound(f"No webhook endpoint found with id '{after}'.", param="after")
        return WebhookEndpointList.of(list(map(_object, page.items)), has_more=page.has_more)

    async def retrieve_webhook_endpoint(self, webhook_endpoint_id: str, account_id: AccountId) -> WebhookEndpointObject:
        """Return an endpoint, without its secret."""
        return _object(_found(await self.webhooks.endpoint(webhook_endpoint_id, account_id), webhook_endpoint_id))

    async def update_webhook_endpoint(
        self, webhook_endpoint_id: str, body: UpdateWebhookEndpoint, account_id: AccountId
    ) -> WebhookEndpointObject:
        """Change an endpoint."""
        changes = body.model_dump(include=body.model_fields_set)
        if "url" in changes:
            _check_url(body.url, self.allowed)
        if "event_types" in changes:
            changes["event_types"] = tuple(map(EventType, body.event_types))
        updated = await self.webhooks.update_endpoint(webhook_endpoint_id, account_id, self.clock.now(), **changes)
        return _object(_found(updated, webhook_endpoint_id))

    async def delete_webhook_endpoint(self, webhook_endpoint_id: str, account_id: AccountId) -> DeletedWebhookEndpoint:
        """Forget an endpoint and everything that is on its way there."""
        if not await self.webhooks.delete_endpoint(webhook_endpoint_id, account_id):
            raise _not_found(webhook_endpoint_id)
        return DeletedWebhookEndpoint(id=webhook_endpoint_id)

    async def rotate_webhook_secret(
        self,
        webhook_endpoint_id: str,
        account_id: AccountId,
        body: RotateWebhookSecret | None = None,
    ) -> WebhookEndpointWithSecret:
        """Give an endpoint a new signing secret and show it."""
        keep_old = body is not None and body.keep_old_secret_active_for_24_hours
        rotated = await self.webhooks.rotate_secret(
            webhook_endpoint_id,
            account_id,
            _new_secret(),
            self.clock.now(),
            keep_old_s=KEEP_OLD_SECRET_S if keep_old else 0,
        )
        return _with_secret(_found(rotated, webhook_endpoint_id))

    async def test_webhook_endpoint(
        self, webhook_endpoint_id: str, body: SendTestEvent, account_id: AccountId
    ) -> WebhookEndpointTestResult:
        """Send a made-up event once, now, and return what the receiver answered."""
        endpoint = _found(await self.webhooks.endpoint(webhook_endpoint_id, account_id), webhook_endpoint_id)
        event = Event(self.ids.new("evt_"), EventType(body.event_type), self.clock.now(), TEST_BATCH_ID)
        reply = await self.send(endpoint, event, self.ids.new("wh_"))
        if isinstance(reply, NoReply):
            raise InvalidRequest(f"The test event was not delivered: {reply.reason}.", code="webhook_test_failed")
        return WebhookEndpointTestResult(
            webhook_endpoint_id=endpoint.id, event_type=body.event_type, status_code=reply.status
        )

    async def list_webhook_deliveries(
        self,
        webhook_endpoint_id: str,
        account_id: AccountId,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> WebhookDeliveryList:
        """Return a page of what was sent or is to be sent to an endpoint, newest first."""
        _found(await self.webhooks.endpoint(webhook_endpoint_id, account_id), webhook_endpoint_id)
        page = await self.webhooks.list_deliveries(webhook_endpoint_id, limit=limit, after=after)
        if page is None:
            raise NotFound(f"No webhook delivery found with id '{after}'.", param="after")
        return WebhookDeliveryList.of(list(map(_delivery_object, page.items)), has_more=page.has_more)

    async def list_webhook_event_types(self, _: AccountId) -> WebhookEventTypeList:
        """Return every event that an endpoint can be told."""
        return WebhookEventTypeList(data=[event_type.value for event_type in EventType])


def _check_url(url: str, allowed: AllowedHosts) -> None:
    judged = judge_url(url, allowed)
    if isinstance(judged, Refused):
        raise InvalidRequest(f"Invalid 'url': it {judged.reason}.", param="url", code="invalid_value")


def _found(endpoint: WebhookEndpoint | None, endpoint_id: str) -> WebhookEndpoint:
    if endpoint is None:
        raise _not_found(endpoint_id)
    return endpoint


def _not_found(endpoint_id: str) -> NotFound:
    return NotFound(f"No webhook endpoint found with id '{endpoint_id}'.")


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def _object(endpoint: WebhookEndpoint) -> WebhookEndpointObject:
    return WebhookEndpointObject(
        id=endpoint.id,
        created_at=endpoint.created_at,
        updated_at=endpoint.updated_at,
        name=endpoint.name,
        url=endpoint.url,
        event_types=list(endpoint.event_types),
        signing_secret_hint=f"whsec_...{endpoint.secret.rstrip('=')[-4:]}",
        disabled_at=endpoint.disabled_at,
    )


def _with_secret(endpoint: WebhookEndpoint) -> WebhookEndpointWithSecret:
    return WebhookEndpointWithSecret(**_object(endpoint).model_dump(), signing_secret=endpoint.secret)


def _delivery_object(delivery: Delivery) -> WebhookDeliveryObject:
    event = delivery.event
    return WebhookDeliveryObject(
        id=delivery.id,
        webhook_endpoint_id=delivery.endpoint_id,
        event_id=event.id,
        event_type=event.type.value,
        batch_id=event.batch_id,
        created_at=event.created_at,
        state=delivery.state,
        attempts=delivery.attempts,
        last_status_code=delivery.last_status,
        last_error=delivery.last_error,
        next_attempt_at=delivery.next_attempt_at,
        delivered_at=delivery.delivered_at,
    )
