"""Every bound that is not a setting: its name ends in its unit, and its reason stands beside it."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# A line that carries a few base64 images fits; a runaway file without newlines does not fill memory.
LINE_BYTES_MAX = 16 * MIB
# Long enough for a URL or a path as an id; short enough that ids never dominate a result file.
CUSTOM_ID_CHARS_MAX = 512
# Every decoder that meets a line, ours and the engine's, takes this depth whatever its own stack is.
JSON_DEPTH_MAX = 256
# Keys and values of a line, each up to 80 bytes while the line is checked. OpenAI's largest request of embeddings,
# 300,000 tokens given as numbers, fits.
LINE_VALUES_MAX = 500_000
# Bad lines that are remembered by their number and problem while a file is checked, and left out when it is run.
LINE_PROBLEMS_MAX = 100_000
# A batch object with this many problems is 1.5 MB of JSON and 60 ms of the event loop; the rest is counted.
PROBLEMS_LISTED_MAX = 10_000
# The same of each batch in a listing, of which there are up to 100.
PROBLEMS_OF_LISTED_BATCH_MAX = 100

# A shard is the unit of scheduling, of recovery and of growth of the readable output. About 64 a batch keeps
# progress visible; the upper bounds keep a shard's sort and its re-read after a crash within a second.
SHARDS_PER_BATCH_AIM = 64
SHARD_BYTES_MIN = 64 * KIB
SHARD_BYTES_MAX = 16 * MIB
SHARD_LINES_MAX = 4096

# Custom_id hashes held in memory while a file is planned, 8 bytes each; more spill to a temporary file.
PLANNING_HASHES_IN_MEMORY_MAX = 2_000_000
# The same for the digests of bodies, 24 bytes each, of a batch that is to run identical lines once.
PLANNING_DIGESTS_BYTES_MAX = 8 * MIB

# Reads and writes of stored files: large enough that a call's overhead vanishes, small enough for flat memory.
FILE_CHUNK_BYTES = 1 * MIB

# Metadata, as OpenAI has it.
METADATA_PAIRS_MAX = 16
METADATA_KEY_CHARS_MAX = 64
METADATA_VALUE_CHARS_MAX = 512

# The head of a request is a few kilobytes at once. A client that stalls or trickles must not keep a connection.
REQUEST_HEAD_S_MAX = 30.0
# No honest head comes near; more than one read brings, so that what came with a head need not be told from it.
REQUEST_HEAD_BYTES_MAX = 512 * KIB

# A JSON request body (never a file) is read whole.
JSON_BODY_BYTES_MAX = 1 * MIB
# The longest one, the ids of an upload's parts, at 1 Mbit/s.
JSON_BODY_S_MAX = 60.0

# What can be a line can be tried as a live request.
LIVE_BODY_BYTES_MAX = LINE_BYTES_MAX
# Each holds its body, and its answer unless that is streamed: a few hundred people and tools, within memory.
LIVE_IN_FLIGHT_MAX = 256
# The longest body at 1 Mbit/s; a client that stalls must not keep its place.
LIVE_BODY_S_MAX = 150.0

# A client that sends less than this in this time, 17 kbit/s, has stalled: its connection and its disk space are freed.
UPLOAD_STEP_BYTES = 64 * KIB
UPLOAD_STEP_S_MAX = 30.0
# OpenAI's "64 MB", read as its own client reads it: that is the part it sends by default.
UPLOAD_PART_BYTES_MAX = 64 * MIB
# The rows of one upload are completed in one transaction; this many take about a second.
UPLOAD_PARTS_MAX = 100_000
# What so many parts can carry, about 6 TiB; files themselves have no bound.
UPLOAD_BYTES_MAX = UPLOAD_PARTS_MAX * UPLOAD_PART_BYTES_MAX
# As OpenAI has it.
UPLOAD_LIFETIME_S = 3600
# The ids of all parts, 37 characters each, in JSON.
UPLOAD_COMPLETE_BODY_BYTES_MAX = 64 * UPLOAD_PARTS_MAX
