"""How small a teacher's maps can be stored, and what that does to the loss and to a student's gradient.

    python benchmarks/cache.py --teacher runs/teacher --student runs/a-student --data shards/dns
    python benchmarks/cache.py --teacher manner-b --student manner-s-5.3gf --data shards/dns

Every way of storing is compared with exact maps on the same segments: bytes per segment beside those of the
segment's FLAC, the difference of the attention-transfer loss, and the cosine between the student's gradients
of that loss. That is the strictest place to look: the enhancement loss is exact, and only raises the cosine.
A name of a size stands for an untrained network whose BatchNorm has heard the segments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import zstandard
from tabulate import tabulate
from torch import Tensor

from mvat_dist.config import sizes as students
from mvat_dist.config.schema import SAMPLE_RATE, DataConfig, DistilConfig
from mvat_dist.config.sizes import ViewKey
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.data.shards import target_codec
from mvat_dist.data.shards.codecs import encode_flac
from mvat_dist.data.shards.target_codec import SegmentTargets, decode, encode
from mvat_dist.losses.mvat import energy_map
from mvat_dist.losses.objective import Objective, prepare_targets
from mvat_dist.models import weights
from mvat_dist.models.manner import Manner
from mvat_dist.runs import weights as weightsfile

Maps = dict[ViewKey, Tensor]
COARSENESS = (0.05, 0.1, 0.15, 0.3)
POOLED = (4005, 1001, 250)


def main() -> None:
    """Hear, store in every way, compare, print."""
    arguments = _parse()
    torch.manual_seed(0)
    noisy, clean = _segments(arguments)
    teacher = _network(arguments.teacher, noisy).eval().requires_grad_(False)
    student = _network(arguments.student, noisy).train()
    with torch.no_grad():
        views = teacher(noisy, return_views=True)[1]
    exact = {key: energy_map(feature) for key, feature in views.items()}
    compare = _Comparison(student, Objective(DistilConfig(method="mvat"), student.size, teacher.size))
    loss, gradient = compare(noisy, clean, exact)
    flac = np.mean([len(encode_flac(np.round(clip * 32767).astype(np.int16))) for clip in noisy.numpy()])

    rows = []
    for name, store in _ways().items():
        size, maps = store(exact)
        found, turned = compare(noisy, clean, maps)
        cosine = torch.nn.functional.cosine_similarity(gradient, turned, dim=0)
        length = float(turned.norm() / gradient.norm())
        rows.append((name, size / 1e3, size / flac, found - loss, 1.0 - float(cosine), length))
    seconds = noisy.shape[1] / SAMPLE_RATE
    print(
        f"teacher {arguments.teacher}, student {arguments.student}: {len(noisy)} segments of {seconds:g} s, "
        f"FLAC {flac / 1e3:.0f} kB each, loss {loss:.3f}\n"
    )
    heads = ["maps", "kB", "of FLAC", "loss, difference", "1 - cosine", "gradient, length"]
    print(tabulate(rows, heads, floatfmt=("", ".1f", ".2f", "+.4f", ".1e", ".3f")))


def _parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--teacher", required=True, help="weights, a run, or the name of a size")
    made.add_argument("--student", required=True, help="weights, a run, or the name of a size")
    made.add_argument("--data", required=True, help="a packed corpus")
    made.add_argument("--segments", type=int, default=8)
    made.add_argument("--seconds", type=float, default=4.0)
    return made.parse_args()


def _segments(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(B, T) noisy and clean, mixed from different utterances."""
    config = DataConfig(
        train=arguments.data, segment_seconds=arguments.seconds, variants=1, reverb_probability=0.0
    )
    data = TrainingData(config, seed=0)
    numbers = np.linspace(0, len(data) - 1, arguments.segments).astype(int)
    made = [data.segment(int(number)) for number in numbers]
    return (
        torch.from_numpy(np.stack([one.noisy for one in made])),
        torch.from_numpy(np.stack([one.clean for one in made])),
    )


def _network(name: str, noisy: Tensor) -> Manner:
    if name not in students.SIZES:
        return weights.load(weightsfile.resolve(Path(name))).model
    network = Manner(students.get(name)).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 0.3
    with torch.no_grad():
        for at in range(0, len(noisy), 2):
            network(noisy[at : at + 2])
    return network


class _Comparison:
    """The attention-transfer loss of one student, and its gradient in float64."""

    def __init__(self, student: Manner, objective: Objective) -> None:
        self._student, self._objective = student, objective

    def __call__(self, noisy: Tensor, clean: Tensor, maps: Maps) -> tuple[float, Tensor]:
        state = {key: value.clone() for key, value in self._student.state_dict().items()}
        loss, gradient = 0.0, torch.zeros(0, dtype=torch.float64)
        micro_batches = range(0, len(noisy), 2)
        for at in micro_batches:
            part = slice(at, at + 2)
            said = {key: values[part] for key, values in maps.items()}
            prepared = prepare_targets(noisy[part], clean[part], said)
            terms = self._objective(*self._student(noisy[part], return_views=True), prepared)
            found = torch.autograd.grad(terms["mvat"], list(self._student.parameters()), allow_unused=True)
            flat = torch.cat([one.flatten().double() for one in found if one is not None])
            gradient = flat if at == 0 else gradient + flat
            loss += float(terms["mvat"].detach()) / len(micro_batches)
        self._student.load_state_dict(state)
        return loss, gradient


def _ways() -> Mapping[str, Callable[[Maps], tuple[float, Maps]]]:
    ways: dict[str, Callable[[Maps], tuple[float, Maps]]] = {
        "fp32": lambda maps: _stored(maps, "fp32", target_codec.COARSENESS),
        "fp16": lambda maps: _stored(maps, "fp16", target_codec.COARSENESS),
    }
    for coarseness in COARSENESS:
        name = f"compact, step {coarseness}" + (" (ours)" if coarseness == target_codec.COARSENESS else "")
        ways[name] = lambda maps, coarseness=coarseness: _stored(maps, "compact", coarseness)  # type: ignore[misc]
    ways |= {"8-bit logarithm": _logarithmic}
    for frames in POOLED:
        ways[f"fp16, pooled to at most {frames}"] = lambda maps, frames=frames: _pooled(maps, frames)  # type: ignore[misc]
    return ways


def _stored(maps: Maps, codec: target_codec.Codec, coarseness: float) -> tuple[float, Maps]:
    """Mean bytes of a segment, and the maps as they come back."""
    contents = [encode(SegmentTargets(one, None), codec, coarseness) for one in _items(maps)]
    frames = {key: values.shape[1] for key, values in maps.items()}
    back = [decode(content, codec, frames).maps for content in contents]
    return float(np.mean([len(content) for content in contents])), _batched(back)


def _logarithmic(maps: Maps) -> tuple[float, Maps]:
    """256 steps over 80 dB below the largest value, the usual 8 bits."""
    sizes, back = [], []
    for item in _items(maps):
        size, restored = 0, {}
        for key, values in item.items():
            decibels = 10 * np.log10(np.maximum(values / max(values.max(), 1e-30), 1e-8))
            codes = np.rint((decibels + 80) * 255 / 80).astype(np.uint8)
            size += len(zstandard.ZstdCompressor(9).compress(codes.tobytes()))
            restored[key] = np.where(codes > 0, 10 ** ((codes * (80 / 255) - 80) / 10), 0).astype(np.float32)
        sizes.append(size)
        back.append(restored)
    return float(np.mean(sizes)), _batched(back)


def _pooled(maps: Maps, most: int) -> tuple[float, Maps]:
    """Means over spans of time, repeated over each span: half precision, compressed."""
    sizes, back = [], []
    for item in _items(maps):
        size, restored = 0, {}
        for key, values in item.items():
            width = -(-values.size // most)
            padded = np.pad(values, (0, -values.size % width), mode="edge").reshape(-1, width).mean(1)
            scale = max(float(padded.max()), 1e-30)
            half = (padded / scale).astype(np.float16)
            size += len(zstandard.ZstdCompressor(9).compress(half.tobytes()))
            restored[key] = np.repeat(half.astype(np.float32) * scale, width)[: values.size]
        sizes.append(size)
        back.append(restored)
    return float(np.mean(sizes)), _batched(back)


def _items(maps: Maps) -> list[dict[ViewKey, np.ndarray]]:
    count = len(next(iter(maps.values())))
    return [{key: values[at].numpy() for key, values in maps.items()} for at in range(count)]


def _batched(items: list[dict[ViewKey, np.ndarray]]) -> Maps:
    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}


if __name__ == "__main__":
    main()
