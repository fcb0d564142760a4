"""How fast are 4 s crops read? One thread, warm cache, all ways in one run.

    python benchmarks/loader.py --corpus DIR      # DIR in DNS-Challenge layout, of recordings of over 4 s

Files with soundfile, plain `webdataset` over our shards, and our reader, each as FLAC and as 16-bit samples;
then the stream of `mvat_dist` in sources mode, mixing and all. Rounds alternate between the ways and repeat
the same crops; the best round counts, because other work on the machine can only slow a round.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import webdataset
from tabulate import tabulate

from mvat_dist import pack
from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing import mix
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.errors import exit_code

RATE = 16_000
FRAMES = 4 * RATE
Way = Callable[[np.random.Generator, int], None]
"""Read so many crops at places drawn from the generator."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="recordings to read")
    parser.add_argument("--clips", type=int, default=150, help="crops of each round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work", type=Path, default=None, help="folder for files and shards")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        folder = Path(work)
        shards = {codec: _packed(args.corpus, folder / codec, codec) for codec in ("flac", "int16")}
        subsets = {codec: ShardSet.open(out / "train_clean") for codec, out in shards.items()}
        long = np.flatnonzero(subsets["flac"].samples >= FRAMES)
        ways: dict[str, Way] = {
            "WAV files, soundfile": _files(folder / "wav", subsets["flac"], long),
            "FLAC files, soundfile": _files(folder / "flac_files", subsets["flac"], long),
            "webdataset, FLAC": _webdataset(subsets["flac"]),
            "webdataset, int16": _webdataset(subsets["int16"]),
            "ShardSet, FLAC": _shard_set(subsets["flac"], long),
            "ShardSet, int16": _shard_set(subsets["int16"], long),
            "mixing alone (SNR, level)": _mixing(subsets["int16"], long),
            "sources mode, FLAC": _sources(shards["flac"]),
            "sources mode, int16": _sources(shards["int16"]),
        }
        print(_table(_measure(ways, args.clips, args.rounds)))


def _packed(corpus: Path, out: Path, codec: str) -> Path:
    argv = ["dns", "--corpus", str(corpus), "--out", str(out), "--codec", codec, "--workers", "1"]
    # As many utterances of at least 4 s as there are: `webdataset` cannot skip the others without reading.
    if exit_code(pack.main, [*argv, "--min-seconds", "4", "--valid-clips", "0"]):
        raise SystemExit("packing failed")
    return out


def _files(folder: Path, subset: ShardSet, long: np.ndarray) -> Way:
    """One file per utterance, opened and sought, the length taken from its header."""
    folder.mkdir()
    suffix = "wav" if folder.name == "wav" else "flac"
    paths = []
    for index in long.tolist():
        paths.append(folder / f"{index}.{suffix}")
        soundfile.write(paths[-1], subset.read(index), RATE, subtype="PCM_16")

    def read(random: np.random.Generator, clips: int) -> None:
        for at in random.integers(len(paths), size=clips).tolist():
            with soundfile.SoundFile(paths[at]) as sound:
                sound.seek(int(random.integers(sound.frames - FRAMES + 1)))
                _check(sound.read(FRAMES, dtype="float32"))

    return read


def _webdataset(subset: ShardSet) -> Way:
    """The tars in their order, over and over; webdataset's own decoders unpickle, so decoding is ours."""
    urls = [str(subset.folder / shard.name) for shard in subset.shards]
    extension = "flac" if subset.codec == "flac" else "npy"

    def samples():  # type: ignore[no-untyped-def]
        while True:
            yield from webdataset.WebDataset(urls, shardshuffle=False)

    endless = samples()

    def read(random: np.random.Generator, clips: int) -> None:
        for sample in islice(endless, clips):
            content = sample[extension]
            if extension == "flac":
                with soundfile.SoundFile(io.BytesIO(content)) as sound:
                    sound.seek(int(random.integers(sound.frames - FRAMES + 1)))
                    _check(sound.read(FRAMES, dtype="float32"))
            else:
                pcm = np.load(io.BytesIO(content), allow_pickle=False)
                start = int(random.integers(pcm.size - FRAMES + 1))
                _check(pcm[start : start + FRAMES].astype(np.float32) / np.float32(32768))

    return read


def _shard_set(subset: ShardSet, long: np.ndarray) -> Way:
    def read(random: np.random.Generator, clips: int) -> None:
        for index in random.choice(long, clips).tolist():
            start = int(random.integers(int(subset.samples[index]) - FRAMES + 1))
            _check(subset.read(index, start=start, frames=FRAMES))

    return read


def _mixing(subset: ShardSet, long: np.ndarray) -> Way:
    speech, noise = (subset.read(int(index), frames=FRAMES) for index in long[:2])

    def read(random: np.random.Generator, clips: int) -> None:
        for _ in range(clips):
            _check(mix.mix(speech, noise, float(random.uniform(0, 20)), -25.0).noisy)

    return read


def _sources(shards: Path) -> Way:
    """What the training stream does for a segment; rooms and changes of tempo are left out."""
    config = DataConfig(
        train=str(shards), mode="dynamic", segment_seconds=4.0, reverb_probability=0.0, tempo_probability=0.0
    )
    data = TrainingData(config, seed=0)

    def read(random: np.random.Generator, clips: int) -> None:
        for position in random.integers(len(data), size=clips).tolist():
            _check(data.item(0, position).noisy)

    return read


def _check(audio: np.ndarray) -> None:
    assert audio.shape == (FRAMES,), audio.shape


def _measure(ways: dict[str, Way], clips: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time per clip in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, read in ways.items():
            random = np.random.default_rng(0)
            began = time.process_time()
            read(random, clips)
            seconds[name].append((time.process_time() - began) / clips)
    return seconds


def _table(seconds: dict[str, list[float]]) -> str:
    best = {name: min(values) for name, values in seconds.items()}
    flac, plain = best["FLAC files, soundfile"], best["webdataset, FLAC"]
    rows = [
        {
            "way": name,
            "clips/s": round(1 / one),
            "us/clip": round(1e6 * one),
            "x FLAC files": f"{flac / one:.2f}",
            "x webdataset FLAC": f"{plain / one:.2f}",
        }
        for name, one in best.items()
    ]
    return tabulate(rows, headers="keys", tablefmt="github")


if __name__ == "__main__":
    main()
