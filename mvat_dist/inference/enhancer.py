"""A trained network for audio of any rate, length and number of channels: ``mvat_dist.load(path)``."""

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
"""Longest input of one pass. Beyond it the network hears overlapping windows (docs/export.md has the
measurement behind these two)."""
OVERLAP_SECONDS = 2.0

BLOCK = 1 << 16
"""Frames read, resampled and written at a time. Files and arrays are cut alike: the same samples come out."""

LOUDEST = 1e6
"""Largest sample, 120 dB above full scale: beyond it squares leave the range of float32."""

HIGHEST_RATE = 10**7
"""Hz."""

MOST_CHANNELS = 1024
"""What libsndfile can store; an array with more is probably transposed."""


class UnusableAudioError(UserError, ValueError):
    """Audio, or a rate, that no network can enhance: one line of a command, a `ValueError` to a caller."""


class Enhancer:
    """Enhances speech with one network.

    Channels are enhanced one by one. The network hears 16 kHz, so nothing above 8 kHz is left, except
    what `dry` keeps of the input.
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
            batch: windows that it hears at once; more than 1 pays on a GPU.
            precision: ``bf16`` computes the products in half the bits (docs/performance.md has its cost).
        """
        self.name = loaded.name
        self.device = torch.device(device)
        self.batch = batch
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self._network = folded(loaded.model).to(self.device)

    def enhance(self, audio: npt.ArrayLike, sample_rate: int, dry: float = 0.0) -> Audio:
        """The enhanced speech, with the shape, rate and level of `audio`; what the command writes, too.

        Args:
            audio: (T,) or, as soundfile reads it, (T, C); floats with full scale 1, or integers of 8,
                16 or 32 bits with a sign, whose full scale is that of their type.
            sample_rate: in Hz.
            dry: 0 to 1, how much of the input is kept: ``(1 - dry) * enhanced + dry * audio``.

        Returns:
            float32, not clipped.

        Raises:
            UnusableAudioError: another shape, more channels than frames, no rate, or samples that are not
                finite.
        """
        samples = _floats(np.asarray(audio))
        frames = samples if samples.ndim == 2 else samples[:, None]
        blocks = (frames[start : start + BLOCK] for start in range(0, len(frames), BLOCK))
        pieces = [frames[:0], *self.stream(blocks, sample_rate, frames.shape[1], dry)]
        return np.concatenate(pieces).reshape(samples.shape)

    def stream(
        self, blocks: Iterable[Audio], sample_rate: int, channels: int, dry: float = 0.0
    ) -> Iterator[Audio]:
        """Enhance a stream in bounded memory; it comes out as long, and up to `WINDOW_SECONDS` later.

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
        kept = _Kept(channels)
        narrow = _resampled(kept.keep(blocks), sample_rate, SAMPLE_RATE, channels)
        overlap = round(OVERLAP_SECONDS * SAMPLE_RATE)
        windows = self._passes(cut(narrow, round(WINDOW_SECONDS * SAMPLE_RATE), overlap))
        for enhanced in _resampled(join(windows, overlap), SAMPLE_RATE, sample_rate, channels):
            noisy = kept.take(len(enhanced))
            yield _mixed(enhanced[: len(noisy)], noisy, dry)
        # Resampled there and back, the stream may end a few frames early.
        noisy = kept.take()
        yield _mixed(np.zeros_like(noisy), noisy, dry)

    def _passes(self, windows: Iterator[Window]) -> Iterator[Window]:
        """Each window with its channels enhanced; `batch` of them are held at once."""
        while several := list(itertools.islice(windows, self.batch)):
            enhanced = iter(self._rows([row for window in several for row in window.audio.T]))
            for audio, shared in several:
                yield Window(np.stack(list(itertools.islice(enhanced, audio.shape[1])), axis=1), shared)

    @torch.inference_mode()
    def _rows(self, rows: list[Audio]) -> list[Audio]:
        """Each of `rows` (T,) through the network, which divides it by its deviation and multiplies back."""
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
    # Not a number is not between any two.
    if not (isinstance(value, numbers.Real) and low <= float(value) <= high):
        raise UnusableAudioError(f"{name} is {value!r}{unit}: it must be a number from {low} to {high}{unit}")


class _Kept:
    """Remembers a stream until the enhanced one has caught up with it."""

    def __init__(self, channels: int) -> None:
        self._blocks: deque[Audio] = deque()
        self._none = np.zeros((0, channels), np.float32)
        self._frames = 0

    def keep(self, blocks: Iterable[Audio]) -> Iterator[Audio]:
        """Hand `blocks` on, checked.

        Raises:
            UnusableAudioError: a sample that would spoil its whole window.
        """
        for block in blocks:
            usable = (np.abs(block) < LOUDEST).all(axis=1)  # not a number is not less than anything
            if not usable.all():
                where = self._frames + int(np.argmin(usable))
                raise UnusableAudioError(f"frame {where} is not finite, or more than 120 dB above full scale")
            self._frames += len(block)
            self._blocks.append(block)
            yield block

    def take(self, frames: int | None = None) -> Audio:
        """The next `frames`, or all that are left: fewer where the stream has ended."""
        found = [self._none]
        while self._blocks and (frames is None or frames > 0):
            block = self._blocks.popleft()
            if frames is not None:
                if len(block) > frames:
                    self._blocks.appendleft(block[frames:])
                    block = block[:frames]
                frames -= len(block)
            found.append(block)
        return np.concatenate(found)


def _mixed(enhanced: Audio, noisy: Audio, dry: float) -> Audio:
    return (1 - dry) * enhanced + dry * noisy if dry else enhanced


def _resampled(blocks: Iterable[Audio], rate_in: int, rate_out: int, channels: int) -> Iterator[Audio]:
    if rate_in == rate_out:
        yield from blocks
        return
    resampler = soxr.ResampleStream(rate_in, rate_out, channels, dtype="float32", quality="VHQ")
    for block in blocks:
        # soxr takes one channel without its axis, and gives it back so.
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
