"""Enhance audio of any rate, length and number of channels with a trained network:
``mvat_dist.load(path)``."""

from __future__ import annotations

import itertools
import numbers
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr
import torch

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.distributed.device import Precision, pick
from mvat_dist.errors import UserError
from mvat_dist.inference.overlap_add import Audio, Window, cut, join
from mvat_dist.models import weights
from mvat_dist.models.fold import folded
from mvat_dist.models.weights import LoadedModel
from mvat_dist.runs.weights import resolve

WINDOW_SECONDS = 16.0
"""Longest input of one pass; longer audio is cut into overlapping windows (measured in docs/export.md)."""
OVERLAP_SECONDS = 2.0

BLOCK = 1 << 16
"""Frames read, resampled and written at a time; the same for files and arrays, so that both give equal
samples."""

LOUDEST = 1e6
"""Largest sample, 120 dB above full scale: squares of larger ones exceed the range of float32."""

HIGHEST_RATE = 10**7
"""Hz."""

MOST_CHANNELS = 1024
"""What libsndfile can store; an array with more is probably transposed."""


class UnusableAudioError(UserError, ValueError):
    """Audio or a rate that no network can enhance; a `ValueError` to a caller of the library."""


class Enhancer:
    """Enhances speech with one network.

    Channels are enhanced one by one. The network works at 16 kHz, so nothing above 8 kHz remains, except the
    part of the input that `dry` keeps.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: torch.device | str = "cpu",
        batch: int = 1,
        precision: Precision = "fp32",
    ) -> None:
        """Put the network on its device.

        Args:
            loaded: the network and its name.
            device: where it runs.
            batch: windows per pass; more than 1 pays on a GPU.
            precision: ``bf16`` computes products with half the bits (docs/performance.md has the cost).
        """
        self.name = loaded.name
        self.device = torch.device(device)
        self.batch = batch
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self._network = folded(loaded.model).to(self.device)

    def enhance(self, audio: npt.ArrayLike, sample_rate: int, dry: float = 0.0) -> Audio:
        """Enhance an array; the result has its shape, rate and level, and equals what the command writes.

        Args:
            audio: (T,) or, as soundfile reads it, (T, C); floats with full scale 1, or signed integers of 8,
            16
                or 32 bits with the full scale of their type.
            sample_rate: in Hz.
            dry: share of the input in the result, 0 to 1: ``(1 - dry) * enhanced + dry * audio``.

        Returns:
            float32, not clipped.

        Raises:
            UnusableAudioError: another shape, more channels than frames, no usable rate, or samples that are
                not finite.
        """
        samples = _floats(np.asarray(audio))
        frames = samples if samples.ndim == 2 else samples[:, None]
        blocks = (frames[start : start + BLOCK] for start in range(0, len(frames), BLOCK))
        pieces = [frames[:0], *self.stream(blocks, sample_rate, frames.shape[1], dry)]
        return np.concatenate(pieces).reshape(samples.shape)

    def stream(
        self, blocks: Iterable[Audio], sample_rate: int, channels: int, dry: float = 0.0
    ) -> Iterator[Audio]:
        """Enhance a stream in bounded memory; the output has its length and comes up to `WINDOW_SECONDS`
        later.

        Args:
            blocks: float32 (T, `channels`), full scale 1.
            sample_rate: in Hz.
            channels: 1 or more.
            dry: as for `enhance`.

        Raises:
            UnusableAudioError: no rate, or samples that are not finite.
        """
        _check_number("sample_rate", sample_rate, 1, HIGHEST_RATE, " Hz")
        _check_number("dry", dry, 0, 1)
        original = _InputBuffer(channels)
        narrow = _resampled(original.keep(blocks), sample_rate, SAMPLE_RATE, channels)
        overlap = round(OVERLAP_SECONDS * SAMPLE_RATE)
        windows = self._passes(cut(narrow, round(WINDOW_SECONDS * SAMPLE_RATE), overlap))
        for enhanced in _resampled(join(windows, overlap), SAMPLE_RATE, sample_rate, channels):
            noisy = original.take(len(enhanced))
            yield _mixed(enhanced[: len(noisy)], noisy, dry)
        # After resampling there and back, the stream may end a few frames early.
        noisy = original.take()
        yield _mixed(np.zeros_like(noisy), noisy, dry)

    def _passes(self, windows: Iterator[Window]) -> Iterator[Window]:
        """Enhance the channels of each window, `batch` windows at a time."""
        while chunk := list(itertools.islice(windows, self.batch)):
            enhanced = iter(self._rows([row for window in chunk for row in window.audio.T]))
            for audio, shared in chunk:
                yield Window(np.stack(list(itertools.islice(enhanced, audio.shape[1])), axis=1), shared)

    @torch.inference_mode()
    def _rows(self, rows: list[Audio]) -> list[Audio]:
        """Enhance each of `rows` (T,)."""
        enhanced: list[Audio] = []
        for start in range(0, len(rows), self.batch):
            noisy = torch.from_numpy(np.stack(rows[start : start + self.batch])).to(self.device)
            with self._autocast:
                estimate = self._network(noisy)
            enhanced.extend(estimate.float().cpu().numpy())
        return enhanced


def load(path: str | Path, device: str = "auto", batch: int = 1, precision: Precision = "fp32") -> Enhancer:
    """A model to enhance with.

    Args:
        path: a run with one student, a student's folder, an exported ``.safetensors`` file, or a checkpoint
            of the authors of MANNER.
        device: ``auto`` takes a GPU where torch sees one; ``cpu``, ``cuda``.
        batch, precision: as for `Enhancer`.

    Raises:
        UserError: no model there, several to choose from, or no such device.
    """
    return Enhancer(weights.load(resolve(Path(path))), pick(device), batch, precision)


def _check_number(name: str, value: Any, low: int, high: int, unit: str = "") -> None:
    # NaN fails both comparisons.
    if not (isinstance(value, numbers.Real) and low <= float(value) <= high):
        raise UnusableAudioError(f"{name} is {value!r}{unit}: it must be a number from {low} to {high}{unit}")


class _InputBuffer:
    """Keeps the input stream until the enhanced stream has caught up with it."""

    def __init__(self, channels: int) -> None:
        self._blocks: deque[Audio] = deque()
        self._none = np.zeros((0, channels), np.float32)
        self._frames = 0

    def keep(self, blocks: Iterable[Audio]) -> Iterator[Audio]:
        """Check `blocks`, remember them and pass them on.

        Raises:
            UnusableAudioError: a sample that would spoil the window around it.
        """
        for block in blocks:
            usable = (np.abs(block) < LOUDEST).all(axis=1)  # NaN is not less than anything
            if not usable.all():
                frame = self._frames + int(np.argmin(usable))
                raise UnusableAudioError(f"frame {frame} is not finite, or more than 120 dB above full scale")
            self._frames += len(block)
            self._blocks.append(block)
            yield block

    def take(self, frames: int | None = None) -> Audio:
        """The next `frames`, or all that remain; fewer at the end of the stream."""
        blocks = [self._none]
        while self._blocks and (frames is None or frames > 0):
            block = self._blocks.popleft()
            if frames is not None:
                if len(block) > frames:
                    self._blocks.appendleft(block[frames:])
                    block = block[:frames]
                frames -= len(block)
            blocks.append(block)
        return np.concatenate(blocks)


def _mixed(enhanced: Audio, noisy: Audio, dry: float) -> Audio:
    return (1 - dry) * enhanced + dry * noisy if dry else enhanced


def _resampled(blocks: Iterable[Audio], rate_in: int, rate_out: int, channels: int) -> Iterator[Audio]:
    if rate_in == rate_out:
        yield from blocks
        return
    resampler = soxr.ResampleStream(rate_in, rate_out, channels, dtype="float32", quality="VHQ")
    for block in blocks:
        # soxr takes and returns a single channel without its axis.
        yield resampler.resample_chunk(block.squeeze(1) if channels == 1 else block).reshape(-1, channels)
    end = np.zeros((0, channels) if channels > 1 else 0, np.float32)
    yield resampler.resample_chunk(end, last=True).reshape(-1, channels)


def _floats(audio: npt.NDArray[Any]) -> Audio:
    """float32 (T,) or (T, C), full scale 1."""
    if audio.ndim not in (1, 2) or (audio.ndim == 2 and not 1 <= audio.shape[1] <= MOST_CHANNELS):
        raise UnusableAudioError(
            f"audio must be (T,) or (T, C), frames by channels, and has shape {audio.shape}"
        )
    if audio.ndim == 2 and 0 < audio.shape[0] < audio.shape[1]:
        raise UnusableAudioError(
            f"audio has shape {audio.shape}, more channels than frames: the layout is (T,) or (T, C), frames "
            "by channels, so transpose it"
        )
    if np.issubdtype(audio.dtype, np.signedinteger) and audio.dtype.itemsize <= 4:
        return (audio / -float(np.iinfo(audio.dtype).min)).astype(np.float32)
    if not np.issubdtype(audio.dtype, np.floating):
        raise UnusableAudioError(f"audio must be floats, int16 or int32, and is {audio.dtype}")
    return audio.astype(np.float32, copy=False)
