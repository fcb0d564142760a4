"""Score networks on held-out clips: one row per clip and network.

Used by the trainer between steps and by `mvat_dist.evaluate`. The clips are dealt out over the ranks,
because one rank that scores alone keeps the others waiting until their collective times out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.clips import UnusableClipError
from mvat_dist.evaluation.metrics.registry import Score
from mvat_dist.evaluation.metrics.score import NO_SAMPLES, SILENCE
from mvat_dist.evaluation.scorer import Pair, score_as_completed
from mvat_dist.evaluation.statistics import NOISY, Row

Audio = npt.NDArray[np.float32]
Clip = tuple[str, Audio, Audio]
"""Key, noisy (T,), clean (T,), as `mvat_dist.data.clips` has them."""
Gather = Callable[[list[Row]], list[list[Row]]]
"""Collects every rank's rows on every rank, as ``torch.distributed.all_gather_object`` does."""


class Clips(Protocol):
    """Held-out pairs by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...


def validate(
    models: Mapping[str, nn.Module],
    clips: Clips,
    metrics: Sequence[str],
    *,
    device: torch.device,
    noisy: bool = False,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = lambda rows: [rows],
) -> list[Row]:
    """One row per clip and model, in the order of `clips` and `models`, equal on every rank.

    Args:
        models: networks on `device` that map (1, T) to (1, T), outside any engine: ranks run them for
            different numbers of clips. They are put into eval mode for the while and get back the mode
            of each of their modules.
        clips: the same on every rank; rank r takes clips r, r + world_size, ...
        metrics: names from `mvat_dist.evaluation.metrics.registry.METRICS`.
        device: where the networks are.
        noisy: score the noisy input too, as the first model, called `NOISY`.
        rank, world_size: this process and their number.
        gather: needed with more than one rank; called once, by all of them.
    """
    local_rows = rows_as_completed(
        models, clips, metrics, device=device, noisy=noisy, wanted=lambda index, _: index % world_size == rank
    )
    names = [NOISY, *models]
    rows = [row for rank_rows in gather(list(local_rows)) for row in rank_rows]
    return sorted(rows, key=lambda row: (row["index"], names.index(row["model"])))


def rows_as_completed(
    models: Mapping[str, nn.Module],
    clips: Clips,
    metrics: Sequence[str],
    *,
    device: torch.device,
    noisy: bool = False,
    processes: int = 1,
    wanted: Callable[[int, str], bool],
) -> Iterator[Row]:
    """The row of each clip and model as soon as it is scored, in any order; the rest is as in `validate`.

    Args:
        processes: scoring workers of this rank; 0 takes one per available CPU.
        wanted: whether the model of a name is to be scored on the clip at a position.
    """
    rows: list[Row] = []
    with _evaluating(models.values()):
        estimates = _estimates(models, clips, device, noisy=noisy, wanted=wanted)
        for position, scores in score_as_completed(_pairs(estimates, rows), metrics, processes=processes):
            _fill(rows[position], scores)
            yield rows[position]


def _pairs(estimates: Iterator[tuple[Row, Pair]], rows: list[Row]) -> Iterator[Pair]:
    """The pairs; their rows are appended to `rows`."""
    for row, pair in estimates:
        rows.append(row)
        yield pair


def _estimates(
    models: Mapping[str, nn.Module],
    clips: Clips,
    device: torch.device,
    *,
    noisy: bool,
    wanted: Callable[[int, str], bool],
) -> Iterator[tuple[Row, Pair]]:
    """The wanted clips as every wanted model enhances them, each with the beginning of its row."""
    for index in range(len(clips)):
        names = [name for name in ([NOISY] if noisy else []) + [*models] if wanted(index, name)]
        if not names:
            continue
        try:
            key, mixture, clean = clips[index]
        except UnusableClipError as error:
            clip_row: Row = {"index": index, "key": error.key, "duration_s": None, "snr_db": None}
            no_audio = np.zeros(0, np.float32)
            for name in names:
                yield (
                    {**clip_row, "model": name, "problem": str(error)},
                    Pair(no_audio, no_audio, error.reason),
                )
            continue
        clip_row = {
            "index": index,
            "key": key,
            "duration_s": round(len(clean) / SAMPLE_RATE, 4),
            "snr_db": _snr(mixture, clean),
        }
        # No network takes a clip of no samples, and no metric does.
        failure = None if len(mixture) else NO_SAMPLES
        for name in names:
            unprocessed = name == NOISY or failure is not None
            estimate = mixture if unprocessed else enhance(models[name], mixture, device)
            yield {**clip_row, "model": name}, Pair(estimate, clean, failure)


@torch.no_grad()
def enhance(model: nn.Module, noisy: Audio, device: torch.device) -> Audio:
    """One pass of `model` over a complete clip (T,); the estimate (T,) in fp32 on the CPU."""
    estimate = model(torch.from_numpy(noisy)[None].to(device))[0]
    array: Audio = estimate.float().cpu().numpy()
    return array


@contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own mode, because some may be frozen in eval mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _snr(noisy: Audio, clean: Audio) -> float | None:
    """10 log10(sum clean^2 / sum (noisy - clean)^2) in dB; None where either sum is zero.

    None also for a silent noisy half, which has neither speech nor noise and would get 0 dB.
    """
    if np.abs(noisy).max(initial=0) < SILENCE:
        return None
    speech, noise = (float(np.square(signal, dtype=np.float64).sum()) for signal in (clean, noisy - clean))
    return round(10 * math.log10(speech / noise), 2) if speech and noise else None


def _fill(row: Row, scores: Mapping[str, Score]) -> None:
    """Add a clip's scores to its row."""
    row.update({name: score.value for name, score in scores.items()})
    row["failure"] = {name: score.failure for name, score in scores.items() if score.failure} or None
