"""JSON schemas, tried out before the pipeline gets them: one that it cannot read would break it for every line.

The trial is a pipeline with the same vocabulary and next to no weights, in a process of its own, since a schema can
also take for ever or all memory: `python -m pronghorn.engines.openvino.grammars GGUF`. It reads a schema a line and
answers `OK` or what is wrong, after a first line `READY`, some seconds after its start.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec

from pronghorn.engines.child import end_child, start_child, take_stdout
from pronghorn.errors import EngineFailed, InvalidRequest
from pronghorn.limits import MIB

# Schemas whose verdict is remembered; a batch seldom has more than a few.
KNOWN_MAX = 256
# A schema of ordinary size takes milliseconds.
TRIAL_S_MAX = 30.0
# A process that reads a vocabulary takes a second or two.
START_S_MAX = 60.0
TRIAL_BYTES_MAX = 4096 * MIB
# Larger schemas make grammars that slow every token down.
SCHEMA_CHARS_MAX = 64 * 1024
_WIDTH = 32


class Grammars:
    """Tells which schemas the pipeline can read."""

    def __init__(self, gguf: str) -> None:
        self._command = (sys.executable, "-m", "pronghorn.engines.openvino.grammars", gguf)
        self._known: OrderedDict[str, str | None] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()

    async def check(self, schema: str) -> None:
        """Raise InvalidRequest for a schema that cannot be followed."""
        async with self._one_at_a_time:
            if schema not in self._known:
                self._known[schema] = await self._try(schema)
            self._known.move_to_end(schema)
            if len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
            problem = self._known[schema]
        if problem is not None:
            raise InvalidRequest(f"The engine cannot follow this JSON schema: {problem}.", param="response_format")

    async def _try(self, schema: str) -> str | None:
        if len(schema) > SCHEMA_CHARS_MAX:
            return f"it has more than {SCHEMA_CHARS_MAX} characters"
        if self._process is not None and self._process.returncode is not None:  # it has ended between two schemas
            await end_child(self._process)
            self._process = None
        self._process = process = self._process or await self._start()
        verdict = b""
        try:
            async with asyncio.timeout(TRIAL_S_MAX):
                verdict = await _ask(process, schema)
        except TimeoutError:
            pass
        finally:
            if verdict != b"OK\n":  # what it holds after a failure is unknown
                self._process = None
                await end_child(process)
        if verdict == b"OK\n":
            return None
        return verdict.decode(errors="replace").strip() or "it takes too much time or memory"

    async def _start(self) -> asyncio.subprocess.Process:
        process = await start_child(*self._command, stderr=asyncio.subprocess.DEVNULL)
        try:
            async with asyncio.timeout(START_S_MAX):
                line = await process.stdout.readline() if process.stdout else b""
        except TimeoutError:
            line = b""
        except BaseException:  # that it is cancelled, too
            await end_child(process)
            raise
        if line != b"READY\n":
            await end_child(process)
            raise EngineFailed("The engine cannot try out JSON schemas.", code="engine_failed")
        return process


async def _ask(process: asyncio.subprocess.Process, schema: str) -> bytes:
    if process.stdin is None or process.stdout is None:
        return b""
    with contextlib.suppress(ConnectionError):
        process.stdin.write(msgspec.json.encode(schema) + b"\n")
        await process.stdin.drain()
    return await process.stdout.readline()


def _write_vocabulary(source: Path, target: Path) -> None:
    """Write a model of one layer and a few numbers a token, with another one's vocabulary."""
    import gguf
    import numpy

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("tokenizer."):
            nested = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=nested)
    words = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH)
    writer.add_vocab_size(words)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tensor("token_embd.weight", numpy.zeros((words, _WIDTH), dtype=numpy.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", numpy.ones(_WIDTH, dtype=numpy.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", numpy.zeros((_WIDTH, _WIDTH), dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Try schemas until standard input closes or one fails."""
    verdicts = take_stdout()
    resource.setrlimit(resource.RLIMIT_DATA, (TRIAL_BYTES_MAX, TRIAL_BYTES_MAX))
    trial = _load(Path(sys.argv[1]))
    verdicts.write("READY\n")
    for number, line in enumerate(sys.stdin.buffer):
        try:
            _run(trial, number, msgspec.json.decode(line, type=str))
            verdicts.write("OK\n")
        except RuntimeError as error:
            verdicts.write(_reason(str(error)) + "\n")


def _load(gguf: Path) -> Any:
    """Return a pipeline with the vocabulary of a model."""
    import openvino_genai

    config = openvino_genai.SchedulerConfig()
    config.num_kv_blocks = 4
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = Path(scratch) / "vocabulary.gguf"
        _write_vocabulary(gguf, vocabulary)
        return openvino_genai.ContinuousBatchingPipeline(vocabulary, config, "CPU", {"INFERENCE_NUM_THREADS": 1})


def _run(trial: Any, number: int, schema: str) -> None:
    """Generate a token that keeps to a schema; raises RuntimeError when none can."""
    import numpy
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig(max_new_tokens=1)
    config.structured_output_config = openvino_genai.StructuredOutputConfig(json_schema=schema)
    handle = trial.add_request(number, openvino.Tensor(numpy.array([[1]], dtype=numpy.int64)), config)
    while handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
        trial.step()


def _reason(text: str) -> str:
    """Return what an exception of the grammar's compiler says, without its place in the source."""
    last = (text.strip().splitlines() or [""])[-1]
    return re.sub(r"^\[[^\]]*\] \S+:\d+: ", "", last) or "it is not a schema"


if __name__ == "__main__":
    main()
