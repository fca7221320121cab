"""A GGUF's weights as the processor multiplies them fastest: `python -m pronghorn.engines.openvino.weights`.

GGUF scales weights in groups of 32, and so small a group keeps the processor from its fast 8-bit instructions. Here
each row of a matrix gets one scale and 8 bits a weight: the rounding is a ninth of that which the file's own 4 bits
made (docs/ENGINES.md).
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pronghorn.engines.openvino import grammars

FILE = "openvino_model.xml"
_LEVELS = 127
# Smaller ones are not weights of a layer.
_SIDE_MIN = 8
# Activations are scaled in groups, which have to divide every row; larger than this they round too much.
_GROUP_MAX = 256


def make(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF into a folder that appears when it is whole; blocks for some seconds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        read = Path(scratch) / "read"
        read.mkdir()
        model = _read(gguf, read)
        group = _quantize(model)
        made = Path(scratch) / "made"
        made.mkdir()
        import openvino

        openvino.save_model(model, made / FILE, compress_to_fp16=False)
        (made / "group").write_text(str(group))
        grammars.write_vocabulary(gguf, made / grammars.FILE)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / FILE).is_file():  # else another process was faster
                raise


def activation_group(folder: Path) -> int:
    """Return how many activations share a scale."""
    return int((folder / "group").read_text())


def _read(gguf: Path, folder: Path) -> Any:
    """Return the model that OpenVINO GenAI makes of a GGUF; it writes it beside the file, so there has to be a link."""
    import openvino
    import openvino_genai

    link = folder / "model.gguf"
    link.symlink_to(gguf.resolve())
    config = openvino_genai.SchedulerConfig()
    config.num_kv_blocks = 1
    openvino_genai.ContinuousBatchingPipeline(link, config, "CPU", {"enable_save_ov_model": True})
    return openvino.Core().read_model(folder / FILE)


def _quantize(model: Any) -> int:
    """Give every matrix of weights 8 bits and a scale a row; return the group for its activations."""
    from openvino import opset13

    rows: set[int] = set()
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or (weights := _weights(node.input(1).get_source_output())) is None:
            continue
        rows.add(weights.shape[1])
        scale = abs(weights).max(axis=1, keepdims=True).clip(min=1e-8) / _LEVELS
        bits = opset13.constant((weights / scale).round().astype("int8"))
        restored = opset13.multiply(opset13.convert(bits, "f32"), opset13.constant(scale.astype("float32")))
        node.input(1).replace_source_output(restored.output(0))
    common = math.gcd(*rows)
    return max((size for size in range(16, _GROUP_MAX + 1, 16) if common % size == 0), default=0)


def _weights(output: Any) -> Any:
    """Return the matrix that an output always has, or None where it depends on the input or is none of weights."""
    import openvino

    shape = output.get_partial_shape()
    if shape.is_dynamic or len(shape) != 2 or min(shape.to_shape()) < _SIDE_MIN or not _is_constant(output.get_node()):
        return None
    constant = openvino.Model([output], [])
    return openvino.compile_model(constant, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({})[0].copy()


def _is_constant(node: Any) -> bool:
    """Tell whether nothing but constants stands before a node."""
    sources = [source.get_source_output().get_node() for source in node.inputs()]
    return all(map(_is_constant, sources)) if sources else node.get_type_name() == "Constant"


if __name__ == "__main__":
    os.dup2(2, 1)
    make(Path(sys.argv[1]), Path(sys.argv[2]))
