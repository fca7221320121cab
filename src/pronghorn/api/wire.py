"""The shapes on the wire, to the letter of OpenAI's API plus `job_id`, and how the domain's values become them.

Those of uploads and of webhooks stand beside their routes, which alone use them.
"""

from __future__ import annotations

import enum
import json
import re
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pronghorn.domain.causes import Cause
from pronghorn.domain.model import Batch, BatchStatus, Endpoint, File, Job, OnInvalid, Progress, Tally, Usage
from pronghorn.domain.planning import Census, Plan, Rejection, listed
from pronghorn.domain.validation import is_too_deep
from pronghorn.engines.base import ModelInfo
from pronghorn.limits import METADATA_KEY_CHARS_MAX, METADATA_PAIRS_MAX, METADATA_VALUE_CHARS_MAX

UNLIMITED = "unlimited"
WINDOW_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
WINDOW_S_MAX = 10 * 365 * 86400
_WINDOW = re.compile(r"([1-9]\d{0,9})([smhd])")

Purpose = Literal["fine-tune", "assistants", "batch", "user_data", "vision", "evals"]


class ErrorBody(BaseModel):
    """What went wrong, in the four keys that every OpenAI client reads."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every answer that is not a 2xx."""

    error: ErrorBody


class Identified(BaseModel):
    """Something that is listed in pages."""

    id: str


Listed = TypeVar("Listed", bound=Identified)


class Page(BaseModel, Generic[Listed]):
    """Some of a listing; the next page starts after the last id of this one."""

    object: Literal["list"] = "list"
    data: list[Listed]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[Listed], *, has_more: bool) -> Self:
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=has_more)


class FileObject(Identified):
    """A file's metadata."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class BatchProblem(BaseModel):
    """Something that validation found wrong with the input; `line` is 1-based."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchProblems(BaseModel):
    """Everything that validation found wrong with the input, in line order."""

    object: Literal["list"] = "list"
    data: list[BatchProblem]


class RequestCounts(BaseModel):
    """Lines in all, with a 2xx answer, and run without one."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(BaseModel):
    cached_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class BatchUsage(BaseModel):
    """Tokens of all successful answers so far."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchProgress(BaseModel):
    """An extension: how fast a running batch moves, when it should end, and why it stands still if it does.

    Prompt tokens are those of successful answers: what the engine had in its cache, and what it had to compute.
    """

    lines_per_second: float | None
    tokens_per_second: float | None
    eta_seconds_min: float | None
    eta_seconds_max: float | None
    cached_prompt_tokens: int
    computed_prompt_tokens: int
    reason: str | None
    stalled_since: int | None


class ErrorCause(BaseModel):
    """An extension: lines that failed alike, with up to five of their custom_ids."""

    status_code: int | None
    code: str | None
    message: str | None
    count: int
    sample_custom_ids: list[str | None]


class BatchObject(Identified):
    """A batch: OpenAI's object, the job it runs under, and our extensions.

    `duplicate_bodies` counts the lines that are not run because an earlier one has their body.
    """

    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    job_id: str
    on_invalid: OnInvalid
    deduplicate: bool
    duplicate_bodies: int | None
    retry_of: str | None
    progress: BatchProgress | None
    error_summary: list[ErrorCause] | None


class BatchList(Page[BatchObject]):
    """One page of batches, newest first."""


class ModelObject(BaseModel):
    """A model that lines can name; `source` is where it comes from, `ready` whether it can answer now."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    source: str
    ready: bool
    detail: str | None


class ModelList(BaseModel):
    """Every model that lines can name."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class JobObject(BaseModel):
    """A job: what batches are created under."""

    id: str
    object: Literal["job"] = "job"
    name: str
    weight: int
    created_at: int


class JobList(BaseModel):
    """Every job, oldest first."""

    object: Literal["list"] = "list"
    data: list[JobObject]


class FileList(Page[FileObject]):
    """One page of files."""


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchCheck(BaseModel):
    """What a batch would be: every problem of its input, and what there is to run. Nothing has been started."""

    object: Literal["batch.check"] = "batch.check"
    valid: bool
    lines: int
    errors: BatchProblems
    models: dict[str, int]
    duplicate_bodies: int
    estimated_prompt_tokens: int


class Request(BaseModel):
    """The body of a request: nothing unknown in it, no conversions, and only what can be written down again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _is_sound(cls, body: Any) -> Any:
        """Refuse what Python's decoder takes and no encoder does: halves of surrogate pairs, NaN, endless nesting."""
        if isinstance(body, dict):
            try:
                sound = not is_too_deep(json.dumps(body, ensure_ascii=False, allow_nan=False).encode())
            except (ValueError, RecursionError):
                sound = False
            if not sound:
                raise PydanticCustomError("json_invalid", "The body is no JSON that can be passed on")
        return body


class CreateJob(Request):
    """A new job: a name for people, and its share of the engine against other jobs."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    weight: Annotated[int, Field(ge=1, le=1000)] = 1


def one_of(known: type[enum.StrEnum], value: str) -> str:
    """Return a value that is one of those known; raises PydanticCustomError, in OpenAI's words, for any other."""
    if value not in list(known):
        *first, last = [f"'{each}'" for each in known]
        raise PydanticCustomError(
            "invalid_value",
            "Invalid value: '{value}'. Supported values are: {supported}.",
            {"value": value, "supported": f"{', '.join(first)}, and {last}"},
        )
    return value


def _check_window(value: str) -> str:
    if value != UNLIMITED and not window_seconds(value):
        raise PydanticCustomError(
            "invalid_value",
            "Invalid value: '{value}' for 'completion_window'. Supported values are: 'unlimited', and a duration such "
            "as '24h', '90m' or '7d'.",
            {"value": value},
        )
    return value


def _check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    if len(metadata) > METADATA_PAIRS_MAX:
        raise PydanticCustomError(
            "object_above_max_properties",
            "Invalid 'metadata': too many properties. Expected an object with at most {max} properties, but got an "
            "object with {got} properties instead.",
            {"max": METADATA_PAIRS_MAX, "got": len(metadata)},
        )
    for key, value in metadata.items():
        if len(key) > METADATA_KEY_CHARS_MAX:
            raise PydanticCustomError(
                "property_name_above_max_length",
                "Invalid 'metadata': property name too long. Expected a name with maximum length {max}, but got a "
                "name with length {got} instead.",
                {"max": METADATA_KEY_CHARS_MAX, "got": len(key)},
            )
        if len(value) > METADATA_VALUE_CHARS_MAX:
            raise PydanticCustomError(
                "string_above_max_length",
                "Invalid 'metadata.{key}': string too long. Expected a string with maximum length {max}, but got a "
                "string with length {got} instead.",
                {"key": key, "max": METADATA_VALUE_CHARS_MAX, "got": len(value), "param": f"metadata.{key}"},
            )
    return metadata


Window = Annotated[str, AfterValidator(_check_window)]
Metadata = Annotated[dict[str, str], AfterValidator(_check_metadata)]


class ExpiresAfter(Request):
    """When a file goes: so many seconds after it was created."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class CreateBatch(Request):
    """A new batch."""

    input_file_id: str
    endpoint: Annotated[str, Field(json_schema_extra={"enum": [endpoint.value for endpoint in Endpoint]})]
    completion_window: Window
    job_id: str | None = None
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    deduplicate: Annotated[bool, Field(description="Run lines with byte-identical bodies once.")] = False
    on_invalid: Annotated[Literal["fail", "skip"], Field(description="What bad lines do to the batch.")] = "fail"

    @field_validator("input_file_id")
    @classmethod
    def _is_file_id(cls, value: str) -> str:
        if not value.startswith("file"):
            raise PydanticCustomError(
                "invalid_value",
                "Invalid 'input_file_id': '{value}'. Expected an ID that begins with 'file'.",
                {"value": value},
            )
        return value

    @field_validator("endpoint")
    @classmethod
    def _is_supported(cls, value: str) -> str:
        return one_of(Endpoint, value)


class RetryBatch(Request):
    """Which failed lines of an ended batch to run again, and what to change in their bodies; null removes a field."""

    codes: list[str] = []
    status_codes: list[int] = []
    overrides: dict[str, Any] = {}
    completion_window: Window | None = None
    metadata: Metadata | None = None


def file_object(file: File) -> FileObject:
    """Return a file as it goes on the wire."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )


def batch_object(batch: Batch) -> BatchObject:
    """Return a batch as it goes on the wire."""
    problems = None if batch.problems is None else msgspec.json.decode(batch.problems)
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint.value,
        model=batch.model,
        errors=None if problems is None else BatchProblems(data=problems),
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        expires_at=batch.expires_at,
        request_counts=RequestCounts(total=batch.total, completed=batch.tally.completed, failed=batch.tally.failed),
        usage=_usage(batch.tally),
        metadata=batch.metadata,
        job_id=batch.job_id,
        on_invalid=batch.on_invalid,
        deduplicate=batch.deduplicate,
        duplicate_bodies=batch.copies if batch.deduplicate else None,
        retry_of=batch.retry_of,
        progress=None if batch.progress is None else _progress(batch.progress, batch.tally.usage),
        error_summary=None if batch.causes is None else [error_cause(cause) for cause in batch.causes],
        **msgspec.structs.asdict(batch.stamps),
    )


def error_cause(cause: Cause) -> ErrorCause:
    """Return one entry of an error summary as it goes on the wire."""
    return ErrorCause(**msgspec.structs.asdict(cause))


def model_object(model: ModelInfo, created: int) -> ModelObject:
    """Return a model as it goes on the wire."""
    return ModelObject(
        id=model.id,
        created=created,
        owned_by=model.owned_by,
        source=model.source,
        ready=model.ready,
        detail=model.detail,
    )


def batch_check(outcome: Plan | Rejection, census: Census) -> BatchCheck:
    """Return what checking an input has come to as it goes on the wire."""
    problems = listed(outcome.skipped) if isinstance(outcome, Plan) else outcome.listed()
    return BatchCheck(
        valid=isinstance(outcome, Plan),
        lines=outcome.lines,
        errors=BatchProblems(data=[BatchProblem(**problem._asdict()) for problem in problems]),
        models=dict(census.models),
        duplicate_bodies=census.duplicate_bodies,
        estimated_prompt_tokens=census.estimated_prompt_tokens,
    )


def job_object(job: Job) -> JobObject:
    """Return a job as it goes on the wire."""
    return JobObject(id=job.id, name=job.name, weight=job.weight, created_at=job.created_at)


def _progress(progress: Progress, usage: Usage) -> BatchProgress:
    return BatchProgress(
        cached_prompt_tokens=usage.cached_tokens,
        computed_prompt_tokens=max(0, usage.input_tokens - usage.cached_tokens),
        **msgspec.structs.asdict(progress),
    )


def _usage(tally: Tally) -> BatchUsage:
    usage = tally.usage
    return BatchUsage(
        input_tokens=usage.input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.input_tokens + usage.output_tokens,
    )


def window_seconds(window: str) -> int | None:
    """Return a completion window in seconds, or None for the one without end and for what is none."""
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * WINDOW_SECONDS[match[2]] if match else 0
    return seconds if 0 < seconds <= WINDOW_S_MAX else None
