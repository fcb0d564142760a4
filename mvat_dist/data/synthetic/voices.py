"""Speech for the synthetic corpus: our own sentences, read by espeak-ng from the wheel `espeakng-loader`.

espeak-ng keeps state between utterances, so that a voice sounds a little different each time. All lines are
therefore spoken in one fresh process and in one order, which makes the result repeatable.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mvat_dist.data.pool import ProcessPool, WorkerDiedError
from mvat_dist.errors import UserError

RATE = 22_050
"""Hz, espeak-ng's own."""

# espeak-ng's speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_POS_CHARACTER = 1
_CHARS_UTF8 = 1
# Half of espeak-ng's own volume, at which some variants clip.
_QUIET = 50

_ACCENTS = ["en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029", "nl", "de", "it", "es"]
_VARIANTS = [*(f"f{number}" for number in range(1, 6)), *(f"m{number}" for number in range(1, 9)), "Andrea"]

_WORDS = {
    "determiner": "the every this that one her his our their another some my",
    "adjective": """quiet yellow heavy narrow early brave hollow gentle purple distant sudden ordinary
        cheerful rough shallow golden crooked patient empty bright thirsty loud frozen western fragile""",
    "noun": """river window teacher basket engine violin garden captain letter shadow bridge kitchen orange
        village thunder pocket whistle farmer island ladder chapel jacket puzzle feather market judge cousin
        valley hammer fish""",
    "verb": """carries follows measures forgets repairs watches borrows chooses crosses covers answers gathers
        hides joins lifts notices opens pushes questions reaches sells throws visits washes""",
    "ending": """behind_the_station under_the_old_oak near_the_harbour in_the_afternoon after_eight_days
        without_a_map before_the_storm along_the_shore for_twenty_minutes at_the_third_corner with_both_hands
        once_again""",
}
_SENTENCE = "determiner adjective noun verb determiner adjective noun ending"


@dataclass(frozen=True)
class Reader:
    """A voice of espeak-ng."""

    voice: str
    pitch: int
    """0 to 99, lower is deeper."""
    intonation: int
    """0 to 99, range of the pitch."""
    rate: int
    """Words per minute."""


@dataclass(frozen=True)
class Line:
    """What one reader says."""

    reader: Reader
    text: str


def readers(count: int, random: np.random.Generator) -> list[Reader]:
    """`count` voices that differ in accent, vocal tract, pitch and pace."""
    voices = [f"{accent}+{variant}" for accent in _ACCENTS for variant in _VARIANTS]
    picked = random.choice(len(voices), size=count, replace=count > len(voices))
    return [
        Reader(
            voices[at],
            int(random.integers(25, 75)),
            int(random.integers(30, 80)),
            int(random.integers(125, 200)),
        )
        for at in picked
    ]


def sentence(random: np.random.Generator) -> str:
    """A random sentence of nine to eleven words in grammatical order."""
    words = [_WORDS[kind].split() for kind in _SENTENCE.split()]
    picked = [choices[int(random.integers(len(choices)))] for choices in words]
    return " ".join(picked).replace("_", " ").capitalize() + "."


def speak(lines: Sequence[Line], seed: int) -> list[npt.NDArray[np.int16]]:
    """The lines as 16-bit audio (T,) at `RATE`, spoken in a process of their own.

    Raises:
        UserError: espeak-ng is not installed, or does not work here.
    """
    with ProcessPool(1) as pool:
        ((_, spoken),) = pool.as_completed(partial(_speak_all, seed=seed), [list(lines)])
    if isinstance(spoken, ImportError):
        raise UserError(
            "the synthetic corpus needs espeak-ng: pip install 'mvat_dist[synthetic]', or use a real corpus"
        ) from spoken
    if isinstance(spoken, WorkerDiedError):
        raise UserError("espeak-ng crashed on this machine: use a real corpus instead") from spoken
    if isinstance(spoken, Exception):
        raise spoken
    return spoken


def _speak_all(lines: list[Line], seed: int) -> list[npt.NDArray[np.int16]]:
    with _espeak(seed) as (library, chunks):
        return [_speak_line(library, chunks, line) for line in lines]


@contextmanager
def _espeak(seed: int) -> Iterator[tuple[Any, list[npt.NDArray[np.int16]]]]:
    """The loaded library, and the list to which its callback appends chunks of audio."""
    import espeakng_loader  # an optional dependency, wanted only here

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(
        _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), _INITIALIZE_DONT_EXIT
    )
    if rate != RATE:
        raise UserError(f"espeak-ng does not start here (it answered {rate}): use a real corpus instead")
    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    chunks: list[npt.NDArray[np.int16]] = []

    def append(samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(
        append
    )
    library.espeak_SetSynthCallback(callback)
    try:
        yield library, chunks
    finally:
        library.espeak_Terminate()


def _speak_line(library: Any, chunks: list[npt.NDArray[np.int16]], line: Line) -> npt.NDArray[np.int16]:
    chunks.clear()
    reader, text = line.reader, line.text.encode() + b"\0"
    if library.espeak_SetVoiceByName(reader.voice.encode()) != 0:
        raise UserError(f"this espeak-ng has no voice {reader.voice}")
    settings = ((_RATE, reader.rate), (_VOLUME, _QUIET), (_PITCH, reader.pitch), (_RANGE, reader.intonation))
    for parameter, value in settings:
        library.espeak_SetParameter(parameter, value, 0)
    size = ctypes.c_size_t(len(text))
    if library.espeak_Synth(text, size, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None) != 0 or not chunks:
        raise UserError(f"espeak-ng did not speak with voice {reader.voice}")
    return np.concatenate(chunks)
