"""Make a small corpus in the DNS-Challenge layout of synthetic voices, noises and rooms.

With it the path from corpus to scores runs on a machine without data. The speech is espeak-ng's:
intelligible, varied in voice and text, and far more regular than people; a network trained on it is a
demonstration.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from tqdm import tqdm

from mvat_dist.data.mixing.mix import mix
from mvat_dist.data.synthetic import voices
from mvat_dist.data.synthetic.noises import GENERATORS, RATE, Signal
from mvat_dist.errors import UserError
from mvat_dist.io import atomic_directory, read_json, write_json

DESCRIPTION = "corpus.json"
READERS = 24
RECORDINGS_PER_KIND = 2
POSITIONS = 4
"""Impulse responses of each room."""

_SECONDS_PER_SENTENCE = 3.6
_NOISE_DBFS = -32.0
_SPEECH_DBFS = (-30.0, -20.0)
_PEAK = 0.9
_TALKERS = 6
_TEST_READERS = 8
_TEST_SNR_DB = (-5.0, 10.0)
_LONGEST_PIECE = 10.0
_SPEED_OF_SOUND = 343.0


def make_corpus(
    out: Path, *, speech_minutes: float, noise_minutes: float, rooms: int, seed: int, test_clips: int = 0
) -> None:
    """Write a synthetic corpus to `out` atomically; do nothing where the same one is there.

    Args:
        out: folder that will hold ``clean_fullband``, ``noise_fullband`` and ``impulse_responses``.
        speech_minutes: about how much speech, in minutes.
        noise_minutes: how much noise, in minutes.
        rooms: how many rooms, with `POSITIONS` impulse responses each.
        seed: of all that is random. The same seed gives the same files.
        test_clips: mixtures for ``test_set``, of readers and noise recordings that are nowhere else,
            at `_TEST_SNR_DB`.

    Raises:
        UserError: `out` holds something else, or espeak-ng is missing.
    """
    description = {
        "made by": "mvat_dist.pack synthetic",
        "speech_minutes": speech_minutes,
        "noise_minutes": noise_minutes,
        "rooms": rooms,
        "seed": seed,
        "test_clips": test_clips,
    }
    if min(speech_minutes, noise_minutes, rooms) <= 0 or seed < 0:
        raise UserError(f"minutes and rooms must be above 0 and the seed must not be negative: {description}")
    if _is_there(out, description):
        return
    random = [np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(4)]
    with atomic_directory(out) as folder:
        _write_speech(folder / "clean_fullband/synthetic_readers", speech_minutes, seed, random[0])
        _write_noise(folder / "noise_fullband/synthetic_noises", noise_minutes, seed, random[1])
        _write_rooms(folder / "impulse_responses/synthetic_rooms", rooms, random[2])
        if test_clips:
            _write_test_set(folder / "test_set/synthetic/no_reverb", test_clips, seed, random[3])
        write_json(folder / DESCRIPTION, description)


def _is_there(out: Path, description: dict[str, Any]) -> bool:
    if (out / DESCRIPTION).exists():
        if read_json(out / DESCRIPTION) == description:
            return True
        raise UserError(
            f"{out} holds a synthetic corpus made with other settings: remove it or choose another folder"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a synthetic corpus: choose another folder")
    return False


def _write_speech(folder: Path, minutes: float, seed: int, random: np.random.Generator) -> None:
    """Utterances of one to three sentences, the readers in turn; every other reader at 22.05 kHz."""
    folder.mkdir(parents=True)
    readers = voices.readers(READERS, random)
    levels = random.uniform(*_SPEECH_DBFS, size=READERS)
    count = max(2, round(minutes * 60 / (2 * _SECONDS_PER_SENTENCE)))
    lines = [
        voices.Line(readers[number % READERS], _text(int(random.integers(1, 4)), random))
        for number in range(count)
    ]
    spoken = voices.speak(lines, seed)
    for number, pcm in enumerate(tqdm(spoken, "writing speech", unit="utt")):
        reader = number % READERS
        rate = (RATE, voices.RATE)[reader % 2]
        audio = soxr.resample(pcm / 32768, voices.RATE, rate, quality="VHQ")
        name = f"synthetic_reader_{reader:05d}_{number // READERS:04d}.wav"
        soundfile.write(folder / name, _scaled(audio, levels[reader]), rate, subtype="PCM_16")


def _text(sentences: int, random: np.random.Generator) -> str:
    return " ".join(voices.sentence(random) for _ in range(sentences))


def _write_noise(folder: Path, minutes: float, seed: int, random: np.random.Generator) -> None:
    """Recordings of every kind, in pieces; one kind at 48 kHz in stereo, as noise collections are."""
    folder.mkdir(parents=True)
    seconds = minutes * 60 / (RECORDINGS_PER_KIND * (len(GENERATORS) + 1))
    recordings = {"babble": _babble(seconds, seed, random)}
    for kind, generator in tqdm(GENERATORS.items(), "making noise", unit="kind"):
        recordings[kind] = [generator(seconds, random) for _ in range(RECORDINGS_PER_KIND)]
    for kind, signals in recordings.items():
        for letter, signal in zip(ascii_lowercase, signals, strict=False):
            pieces = np.array_split(_scaled(signal, _NOISE_DBFS), int(np.ceil(seconds / _LONGEST_PIECE)))
            for number, piece in enumerate(pieces):
                path = folder / f"{kind}_{letter}_{number:02d}.wav"
                if kind == "coloured":
                    wide = soxr.resample(piece, RATE, 48_000, quality="VHQ")
                    soundfile.write(path, np.stack([wide, wide], axis=1), 48_000, subtype="PCM_24")
                else:
                    soundfile.write(path, piece, RATE, subtype="PCM_16")


def _babble(seconds: float, seed: int, random: np.random.Generator) -> list[Signal]:
    """Recordings of several people who read at once; none of them reads the clean speech."""
    sentences = int(np.ceil(seconds / _SECONDS_PER_SENTENCE)) + 2
    talkers = voices.readers(_TALKERS * RECORDINGS_PER_KIND, random)
    spoken = voices.speak([voices.Line(talker, _text(sentences, random)) for talker in talkers], seed + 1)
    samples = int(seconds * RATE)
    babble = []
    for pcm in spoken:
        audio = np.resize(soxr.resample(pcm / 32768, voices.RATE, RATE, quality="VHQ"), samples)
        babble.append(np.roll(audio, int(random.integers(samples))))
    return [np.sum(babble[first::RECORDINGS_PER_KIND], axis=0) for first in range(RECORDINGS_PER_KIND)]


def _write_test_set(folder: Path, clips: int, seed: int, random: np.random.Generator) -> None:
    """Pairs named as the DNS-Challenge's synthetic test sets are."""
    readers = voices.readers(_TEST_READERS, random)
    lines = [voices.Line(readers[number % _TEST_READERS], _text(1, random)) for number in range(clips)]
    kinds = list(GENERATORS)
    for part in ("clean", "noisy"):
        (folder / part).mkdir(parents=True)
    for number, pcm in enumerate(tqdm(voices.speak(lines, seed + 2), "mixing test clips", unit="clip")):
        clean = soxr.resample(pcm / 32768, voices.RATE, RATE, quality="VHQ").astype(np.float32)
        kind, snr = kinds[number % len(kinds)], round(random.uniform(*_TEST_SNR_DB))
        noise = GENERATORS[kind](clean.size / RATE + 0.1, random)[: clean.size].astype(np.float32)
        mixed = mix(clean, noise, snr, random.uniform(*_SPEECH_DBFS))
        name = f"synthetic_{number % _TEST_READERS}_{kind}_snr{snr}_fileid_{number}.wav"
        soundfile.write(folder / "noisy" / name, mixed.noisy, RATE, subtype="PCM_16")
        soundfile.write(folder / "clean" / f"clean_fileid_{number}.wav", mixed.clean, RATE, subtype="PCM_16")


def _write_rooms(folder: Path, rooms: int, random: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for room in tqdm(range(rooms), "making rooms", unit="room"):
        size = random.uniform([3.0, 3.0, 2.4], [8.0, 6.0, 3.5])
        reverberation_time = random.uniform(0.2, 0.6)
        for position in range(POSITIONS):
            talker = random.uniform(0.25, 0.75, size=3) * size
            away = random.standard_normal(3)
            # Near enough for the direct sound to be the loudest, as before a computer.
            microphone = talker + random.uniform(0.3, 0.6) * away / np.linalg.norm(away)
            response = shoebox(size, talker, microphone, reverberation_time)
            soundfile.write(
                folder / f"room_{room:02d}_position_{position}.wav", response, RATE, subtype="PCM_16"
            )


def shoebox(
    size: npt.NDArray[np.float64],
    talker: npt.NDArray[np.float64],
    microphone: npt.NDArray[np.float64],
    reverberation_time: float,
) -> Signal:
    """Impulse response (T,) at `RATE` of an empty box by the image method; peak 0.9.

    Allen and Berkley, "Image method for efficiently simulating small-room acoustics" (JASA, 1979), with
    one reflection coefficient for all walls from Sabine's formula, and delays rounded to samples. The
    coefficient is negative (Lehmann and Johansson, JASA, 2008), or the late echoes would add up to an offset.

    Args:
        size: of the room in metres, as the two positions.
        talker: position of the source.
        microphone: position of the receiver.
        reverberation_time: seconds in which the sound falls by 60 dB.
    """
    volume, surface = size.prod(), 2 * (size[0] * size[1] + size[1] * size[2] + size[2] * size[0])
    absorption = min(0.9, 0.161 * volume / (surface * reverberation_time))
    reflection = -np.sqrt(1 - absorption)
    samples = int(reverberation_time * RATE)
    reach = np.ceil(_SPEED_OF_SOUND * reverberation_time / (2 * size)).astype(int)
    axes, bounces = [], []
    for axis in range(3):
        order = np.arange(-reach[axis], reach[axis] + 1)
        straight = 2 * order * size[axis] + talker[axis]
        mirrored = 2 * order * size[axis] - talker[axis]
        axes.append(np.concatenate([straight, mirrored]) - microphone[axis])
        bounces.append(np.concatenate([np.abs(2 * order), np.abs(2 * order - 1)]))
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    distance = np.sqrt(x**2 + y**2 + z**2).ravel()
    i, j, k = np.meshgrid(*bounces, indexing="ij", sparse=True)
    count = (i + j + k).ravel()
    delay = np.round(distance / _SPEED_OF_SOUND * RATE).astype(int)
    audible = delay < samples
    response = np.bincount(delay[audible], (reflection**count / distance)[audible], samples)
    return np.asarray(response / np.abs(response).max() * _PEAK)


def _scaled(audio: npt.NDArray[Any], level_dbfs: float) -> Signal:
    """`audio` at an RMS of `level_dbfs`, or less where its peak would pass 0.9."""
    gain = 10 ** (level_dbfs / 20) / np.sqrt(np.mean(np.square(audio)))
    return np.asarray(audio * min(gain, _PEAK / np.abs(audio).max()))
