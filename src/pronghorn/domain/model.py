"""The nouns of the system as plain frozen values."""

from __future__ import annotations

import enum

import msgspec

from pronghorn.domain.causes import Cause

# Every row names its account; until there are several, this is the one.
DEFAULT_ACCOUNT = "org-default"


def part(whole: int, index: int, parts: int) -> int:
    """Return the size of one of so many parts, as equal as can be, that make the whole together."""
    return whole // parts + (index < whole % parts)


class Endpoint(enum.StrEnum):
    """An API path that a batch can run."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"

    @property
    def path(self) -> str:
        """The path below an engine's base URL, which itself ends in `/v1`."""
        return self.value.removeprefix("/v1")


class BatchStatus(enum.StrEnum):
    """Where a batch is in its life; `lifecycle` says what may follow what."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class ShardState(enum.StrEnum):
    """Where a shard is: waiting, with a worker, or committed."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"


class Closing(enum.StrEnum):
    """Why a batch's unsent lines are no longer sent; the code their outcomes carry."""

    EXPIRED = "batch_expired"
    CANCELLED = "batch_cancelled"


class Usage(msgspec.Struct, frozen=True):
    """Tokens, as the engine counted them."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )

    def at_least(self, other: Usage) -> Usage:
        """Return the larger of each count, so that what people watch never runs backwards."""
        return Usage(*map(max, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))


class Tally(msgspec.Struct, frozen=True):
    """Outcomes counted: `completed` got a 2xx answer, `failed` ran and did not, `unrun` were never sent."""

    completed: int = 0
    failed: int = 0
    unrun: int = 0
    usage: Usage = Usage()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.completed + other.completed,
            self.failed + other.failed,
            self.unrun + other.unrun,
            self.usage + other.usage,
        )

    @property
    def lines(self) -> int:
        return self.completed + self.failed + self.unrun

    @property
    def tokens(self) -> int:
        return self.usage.input_tokens + self.usage.output_tokens

    def at_least(self, other: Tally) -> Tally:
        """Return the larger of each count, so that what people watch never runs backwards."""
        return Tally(
            max(self.completed, other.completed),
            max(self.failed, other.failed),
            max(self.unrun, other.unrun),
            self.usage.at_least(other.usage),
        )


class BlobRef(msgspec.Struct, frozen=True):
    """Stored bytes: a server-made key and a length in bytes."""

    key: str
    bytes: int


class Job(msgspec.Struct, frozen=True):
    """What a client is given to run batches under: it links them to an account and a share of the engine."""

    id: str
    account_id: str
    name: str
    weight: int
    created_at: int


class File(msgspec.Struct, frozen=True):
    """A stored file: an ordered list of blobs under one id; times are Unix seconds."""

    id: str
    account_id: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None

    def has_expired(self, now: int) -> bool:
        """Tell whether the file's time is over; it is gone for clients from that second on."""
        return self.expires_at is not None and self.expires_at <= now


class BatchStamps(msgspec.Struct, frozen=True):
    """When a batch entered each status, in Unix seconds; never cleared."""

    created_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None


class OnInvalid(enum.StrEnum):
    """What bad lines do to their batch: fail it, or go to its error file while the others run."""

    FAIL = "fail"
    SKIP = "skip"


class Progress(msgspec.Struct, frozen=True):
    """How fast a batch moves and when it should end, by measurement; why it stands still, and since when."""

    lines_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds_min: float | None = None
    eta_seconds_max: float | None = None
    reason: str | None = None
    stalled_since: int | None = None


class Batch(msgspec.Struct, frozen=True):
    """One run of a file's lines against one endpoint.

    `order` grows with creation and breaks ties between equal seconds. `expires_at` is Unix seconds, or None for the
    window "unlimited". `problems` is the JSON array of what validation found, as it goes on the wire; `causes` is why
    lines failed, known at the end. `retry_of` is the batch whose failed lines these are. With `deduplicate` lines whose
    bodies are the same run once; `copies` counts those that do not run because an earlier one does.
    """

    id: str
    order: int
    account_id: str
    job_id: str
    endpoint: Endpoint
    input_file_id: str
    completion_window: str
    status: BatchStatus
    stamps: BatchStamps
    expires_at: int | None
    metadata: dict[str, str] | None
    model: str | None = None
    closing: Closing | None = None
    problems: bytes | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    tally: Tally = Tally()
    progress: Progress | None = None
    causes: list[Cause] | None = None
    on_invalid: OnInvalid = OnInvalid.FAIL
    retry_of: str | None = None
    output_expires_after_s: int | None = None
    deduplicate: bool = False
    copies: int = 0


class ShardKey(msgspec.Struct, frozen=True):
    """Names a shard: its batch and its position in the batch, from 0."""

    batch_id: str
    position: int


class Reject(msgspec.Struct, frozen=True):
    """An input line that is not run because it is invalid: its 1-based number, and what is wrong with it."""

    line: int
    code: str
    message: str


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """A line that is not run because an earlier one, `original`, has the same body, in the shard at `position`."""

    line: int
    original: int
    position: int


class Shard(msgspec.Struct, frozen=True):
    """A run of whole lines: `first_line` is 1-based and physical, `lines` counts the non-blank ones.

    `offset` and `bytes` are in the input file. `epoch` fences: a commit of an earlier one is refused. `rejects` are
    lines among them that go to the error file unsent, `copies` those that get another line's outcome.
    """

    key: ShardKey
    first_line: int
    lines: int
    offset: int
    bytes: int
    state: ShardState = ShardState.PENDING
    epoch: int = 0
    rejects: list[Reject] = []
    copies: list[Copy] = []


class Parts(msgspec.Struct, frozen=True):
    """A finished shard's parts of the output and error files, each in input order."""

    output: BlobRef | None
    errors: BlobRef | None


class ShardResult(msgspec.Struct, frozen=True):
    """What a finished shard leaves: its parts of the output and error files, in input order, counts and causes."""

    output: BlobRef | None
    errors: BlobRef | None
    tally: Tally
    causes: list[Cause]


class Replica(msgspec.Struct, frozen=True):
    """One base URL that answers lines, ending in `/v1`.

    `models` is None when the server has no list of its own: then any name is sent on. `window` is the number of lines
    to send it at once, or None when that has to be found; `slots` is how many of them it runs, the rest being queued,
    or None when that is not known. `sharers` is how many workers send lines to it. Its key is in the environment
    variable `api_key_env`.
    """

    base_url: str
    endpoints: tuple[Endpoint, ...] = tuple(Endpoint)
    models: tuple[str, ...] | None = None
    window: int | None = None
    slots: int | None = None
    api_key_env: str | None = None
    sharers: int = 1

    @property
    def name(self) -> str:
        """What tells it from others, and for people: one URL with two keys is two replicas."""
        return self.base_url if self.api_key_env is None else f"{self.base_url} with {self.api_key_env}"

    def share(self, index: int, workers: int) -> Replica | None:
        """Return the replica as one of so many workers may use it, its stated window divided; None where none is left.

        Its slots are divided as well, which is an estimate: whose lines they run is not known.
        """
        window = None if self.window is None else part(self.window, index, workers)
        slots = None if self.slots is None else max(1, part(self.slots, index, workers))
        if window == 0:
            return None
        return msgspec.structs.replace(self, window=window, slots=slots, sharers=workers)

    def answers(self, endpoint: Endpoint, model: str) -> bool:
        """Tell whether lines for `endpoint` that name `model` can be sent here."""
        return endpoint in self.endpoints and (self.models is None or model in self.models)
