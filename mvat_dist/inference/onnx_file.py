"""ONNX files: written, quantised and run with onnxruntime. Needs the extra ``export``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from mvat_dist.inference.export import Run, example, quiet, traced
from mvat_dist.inference.overlap_add import Audio
from mvat_dist.models.manner import Manner

OPSET = 17
"""Of ONNX: understood by onnxruntime 1.13 (2022) and later."""

INPUT, OUTPUT = "noisy", "enhanced"

_NEXT_TO_THE_WAVEFORM = ("/in_conv/", "/out_conv/", "/mask_gate/")
"""Parts at full rate that stay in floating point: they carry the waveform's whole dynamic range."""


def save(model: Manner, file: Path, about: dict[str, str]) -> None:
    """Write `model` as one ONNX file, with `about` as its metadata."""
    axes = {0: "batch", 1: "time"}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            traced(model),
            (example(),),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: axes, OUTPUT: axes},
        )
    _describe(file, about)


def _describe(file: Path, about: dict[str, str]) -> None:
    graph = onnx.load(file)
    onnx.helper.set_model_props(graph, about)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, file)


def save_int8(source: Path, file: Path, clips: Sequence[Audio], about: dict[str, str]) -> None:
    """Write the ONNX file `source` with 8-bit convolutions and matrix products.

    Args:
        source: what `save` wrote.
        file: to write.
        clips: (T,) each; the ranges of the activations are taken from what they make of them.
        about: metadata.
    """
    prepared = file.with_suffix(".prepared")
    try:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        names = [node.name for node in onnx.load(prepared).graph.node]
        quantize_static(
            str(prepared),
            str(file),
            _Calibration(clips),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_exclude=[name for name in names if any(part in name for part in _NEXT_TO_THE_WAVEFORM)],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        prepared.unlink(missing_ok=True)
    _describe(file, about)


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, clips: Iterable[Audio]) -> None:
        self._inputs = iter([{INPUT: clip[None]} for clip in clips])

    def get_next(self) -> dict[str, Audio] | None:
        """The next input, until there is none."""
        return next(self._inputs, None)


def runner(file: Path) -> Run:
    """An ONNX file as a function of arrays, on as many threads as torch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(noisy: Audio) -> Audio:
        enhanced: Audio = session.run(None, {INPUT: noisy})[0]
        return enhanced

    return run
