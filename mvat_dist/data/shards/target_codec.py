"""The teacher targets of one segment as bytes: energy maps and, optionally, the enhanced waveform.

The bytes are a safetensors file compressed with Zstandard, one tensor per map, named ``side/level/view``.

``compact`` stores each map as whole numbers. The loss compares maps of 2-norm one by their squared L2
distance (`mvat_dist.losses.mvat`), and for that distance a uniform quantiser followed by an entropy coder is
the rate-optimal simple code (Gish and Pierce, "Asymptotically Efficient Quantizing", IEEE Trans. IT, 1968).
All maps of a segment share one step in units of their 2-norm, so that a map of few frames, whose every value
weighs more, is stored as much finer as it is shorter. Pooling over time, the usual way to make maps small,
loses far more: the views fluctuate from frame to frame (``docs/results/2026-11-22-cache.md``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import safetensors.numpy
import zstandard
from numpy.typing import NDArray
from safetensors import SafetensorError

from mvat_dist.config.sizes import ViewKey
from mvat_dist.data.shards.codecs import decode_flac, encode_flac

Codec = Literal["compact", "fp16", "fp32"]
CODECS: tuple[Codec, ...] = ("compact", "fp16", "fp32")

COARSENESS = 0.15
"""Step of `compact` in units of the root mean square of a segment's longest map (design choice)."""

_LEVEL = 9
"""Zstandard's level: beyond it the files shrink by 3 % and take eight times as long to write."""
_OUTPUT = "output"
_PEAK = "output/peak"
_HIGH = "/high"
_CENTRES = "/centres"
_CENTRED = 3
"""Codes below this have a centre of their own; all others share one."""
_LARGEST_OUTPUT = 32767
NORM_FLOOR = 1e-12
"""2-norm at and below which a map counts as silent, as in `mvat_dist.losses.mvat`."""
_SLACK_BYTES = 1 << 16
"""Room for what stands beside maps and output: names, shapes, centres."""

FloatArray = NDArray[np.float32]
Tensors = Mapping[str, NDArray[np.generic]]


class SegmentTargets(NamedTuple):
    """The teacher targets of one segment."""

    maps: dict[ViewKey, FloatArray]
    """(T_b,) energy maps by (side, level, view), each up to a positive factor, which no loss depends on."""
    output: FloatArray | None
    """(T,) enhanced waveform, where it was stored."""


def map_name(key: ViewKey) -> str:
    """``encoder/1/channel``"""
    return "/".join(map(str, key))


def unit_step(frames: int, coarseness: float = COARSENESS) -> float:
    """Step of `compact` on maps of 2-norm one, for a segment whose longest map has `frames` frames.

    A map of T_b frames is then at most ``step / 2 * sqrt(T_b)`` from its exact direction, in 2-norm;
    ``step * sqrt(T_b / 12)`` is typical: 0.075 and 0.043 for the longest map, half of it for the next.
    """
    return coarseness / math.sqrt(frames)


def encode(targets: SegmentTargets, codec: Codec, coarseness: float = COARSENESS) -> bytes:
    """The bytes of one segment's targets; equal targets give equal bytes."""
    if codec == "compact":
        step = unit_step(max(values.size for values in targets.maps.values()), coarseness)
        tensors: dict[str, NDArray[np.generic]] = {}
        for key, values in targets.maps.items():
            tensors |= _quantised(map_name(key), values, step)
    else:
        tensors = {map_name(key): _scaled(values, codec) for key, values in targets.maps.items()}
    if targets.output is not None:
        tensors |= _encode_output(targets.output, codec)
    return zstandard.ZstdCompressor(_LEVEL).compress(safetensors.numpy.save(tensors))


def largest_size(frames: Iterable[int], samples: int) -> int:
    """Most bytes, uncompressed, of targets with maps of `frames` and an output of `samples`."""
    return 4 * (sum(frames) + samples) + _SLACK_BYTES


def decode(
    content: bytes, codec: Codec, wanted: Mapping[ViewKey, int], samples: int = 0, limit: int = 1 << 26
) -> SegmentTargets:
    """The maps that are wanted and, if asked for, the output of one segment.

    Args:
        content: from `encode`.
        codec: as it was encoded.
        wanted: frames of every map to return, by (side, level, view).
        samples: of the output; 0 returns none.
        limit: bytes that they may have, uncompressed; from `largest_size`.

    Raises:
        ValueError: these are not the bytes of such targets, or something that is wanted is missing.
    """
    try:
        if zstandard.frame_content_size(content) > limit:
            raise ValueError("it claims to be larger than teacher targets of such a segment")
        tensors = safetensors.numpy.load(zstandard.ZstdDecompressor().decompress(content))
        maps = {key: _decode_map(tensors, map_name(key), codec, frames) for key, frames in wanted.items()}
        output = _decode_output(tensors, codec, samples) if samples else None
    except (zstandard.ZstdError, SafetensorError) as error:
        raise ValueError(f"these are no encoded teacher targets ({error})") from error
    except KeyError as error:
        raise ValueError(f"it holds no {error.args[0]}") from error
    return SegmentTargets(maps, output)


def _quantised(name: str, values: FloatArray, step: float) -> dict[str, NDArray[np.generic]]:
    """Multiples of the step, and where in each step the values lie on average.

    The centres cost 16 bytes and take off the bias of rounding, which in a map that is mostly near zero does
    more to a gradient than its noise. High bytes, which most maps do not need, are a tensor of their own.
    """
    norm = float(np.sqrt(np.square(values, dtype=np.float64).sum()))
    # A map of zeros has no direction, and stays one of zeros; the loss draws the line at the same norm.
    multiples = values * np.float32(1.0 / (step * norm) if norm > NORM_FLOOR else 0.0)
    codes = np.rint(multiples).astype(np.uint16)
    rest = (multiples - codes).astype(np.float64)
    kind = np.minimum(codes, _CENTRED)
    counts = np.maximum(np.bincount(kind, minlength=_CENTRED + 1), 1)
    centres = np.bincount(kind, rest, minlength=_CENTRED + 1) / counts
    planes: dict[str, NDArray[np.generic]] = {
        name: (codes & 0xFF).astype(np.uint8),
        name + _CENTRES: centres.astype(np.float32),
    }
    high = (codes >> 8).astype(np.uint8)
    if high.any():
        planes[name + _HIGH] = high
    return planes


def _scaled(values: FloatArray, codec: Codec) -> NDArray[np.generic]:
    """The values in the codec's precision; in half precision relative to the largest, or they overflow."""
    if codec == "fp32":
        return values
    largest = float(values.max(initial=0.0))
    return (values / np.float32(largest) if largest > 0.0 else values).astype(np.float16)


def _decode_map(tensors: Tensors, name: str, codec: Codec, frames: int) -> FloatArray:
    stored = _checked(tensors, name, (np.uint8,) if codec == "compact" else (np.float16, np.float32), frames)
    if codec != "compact":
        return stored.astype(np.float32)
    codes = stored.astype(np.int32)
    if name + _HIGH in tensors:
        codes += _checked(tensors, name + _HIGH, (np.uint8,), frames).astype(np.int32) << 8
    centres = _checked(tensors, name + _CENTRES, (np.float32,), _CENTRED + 1).astype(np.float32)
    return codes.astype(np.float32) + centres[np.minimum(codes, _CENTRED)]


def _checked(tensors: Tensors, name: str, types: Sequence[type], size: int) -> NDArray[np.generic]:
    """A tensor of one axis, with as many values as it must have.

    Raises:
        ValueError: another type or shape.
    """
    tensor = tensors[name]
    if tensor.dtype not in types or tensor.shape != (size,):
        raise ValueError(f"its {name} has {tensor.shape} values of {tensor.dtype}, not ({size},)")
    return tensor


def _encode_output(output: FloatArray, codec: Codec) -> dict[str, NDArray[np.generic]]:
    """Full precision, or 16 bits of a full scale that the loudest sample sets; `compact` as FLAC."""
    if codec == "fp32":
        return {_OUTPUT: output}
    peak = max(float(np.abs(output).max(initial=0.0)), 1e-9)
    codes = np.rint(output * (_LARGEST_OUTPUT / peak)).astype(np.int16)
    packed = np.frombuffer(encode_flac(codes), np.uint8) if codec == "compact" else codes
    return {_OUTPUT: packed, _PEAK: np.array([peak], np.float32)}


def _decode_output(tensors: Tensors, codec: Codec, samples: int) -> FloatArray:
    if codec == "fp32":
        return _checked(tensors, _OUTPUT, (np.float32,), samples).astype(np.float32)
    step = _checked(tensors, _PEAK, (np.float32,), 1).astype(np.float32) / np.float32(_LARGEST_OUTPUT)
    if codec == "compact":
        return decode_flac(tensors[_OUTPUT].tobytes(), samples, 0, samples) * (step * np.float32(32768))
    return _checked(tensors, _OUTPUT, (np.int16,), samples).astype(np.float32) * step
