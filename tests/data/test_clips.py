"""Held-out clips from shards and from plain folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from mvat_dist.data.clips import ValidationClips
from mvat_dist.errors import UserError
from tests.tiny_corpus import pcm, write_pairs, write_sources


def audio(seed: int, samples: int = 3000) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(samples)


def write(path: Path, signal: np.ndarray, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, pcm(signal), rate)


@pytest.fixture
def packed(tmp_path) -> Path:
    pairs = {f"p{n:02d}": (audio(n), audio(100 + n)) for n in range(40)}
    return write_pairs(tmp_path / "corpus", "valid", pairs, shards=3)


def test_clips_of_a_packed_subset(packed):
    clips = ValidationClips(packed)
    assert clips.keys == [f"p{n:02d}" for n in range(40)]
    assert len(clips) == 40
    for number, clip in enumerate(clips):
        assert clip.key == clips.keys[number]
        np.testing.assert_array_equal(pcm(clip.noisy), pcm(audio(number)))
        np.testing.assert_array_equal(pcm(clip.clean), pcm(audio(100 + number)))


def test_a_limit_takes_the_same_clips_from_everywhere(packed):
    few = ValidationClips(packed, limit=10).keys
    assert few == sorted(few)
    assert few == ValidationClips(packed, limit=10).keys
    assert set(few) < set(ValidationClips(packed, limit=20).keys)
    assert len(ValidationClips(packed, limit=100)) == 40
    halves = [sum(key < "p20" for key in few), sum(key >= "p20" for key in few)]
    assert min(halves) >= 2


def test_only_the_start_is_read(packed):
    clip = ValidationClips(packed, max_seconds=0.1)[3]
    whole = ValidationClips(packed)[3]
    assert clip.noisy.shape == clip.clean.shape == (1600,)
    np.testing.assert_array_equal(clip.noisy, whole.noisy[:1600])
    np.testing.assert_array_equal(clip.clean, whole.clean[:1600])


def test_clips_of_plain_folders(tmp_path):
    """Two sets of the DNS test layout, one of them at 48 kHz in stereo."""
    for number in (1, 2, 10):
        write(tmp_path / "dry/noisy" / f"speech{number}_snr5_fileid_{number}.flac", audio(number))
        write(tmp_path / "dry/clean" / f"clean_fileid_{number}.flac", audio(50 + number))
    tone = 0.1 * np.sin(2 * np.pi * 500 * np.arange(48_000) / 48_000)
    write(tmp_path / "wet room/noisy/same name.wav", np.stack([tone, 3 * tone], axis=1), 48_000)
    write(tmp_path / "wet room/clean/same name.wav", tone, 48_000)

    clips = ValidationClips(tmp_path)
    assert len(clips) == 4
    found = {clip.key: clip for clip in clips}
    for number in (1, 2, 10):
        clip = found[f"dry/noisy/speech{number}_snr5_fileid_{number}.flac"]
        np.testing.assert_array_equal(pcm(clip.noisy), pcm(audio(number)))
        np.testing.assert_array_equal(pcm(clip.clean), pcm(audio(50 + number)))
    wet = found["wet room/noisy/same name.wav"]
    expected = 0.1 * np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(wet.clean[500:-500], expected[500:-500], atol=2e-4)
    np.testing.assert_allclose(wet.noisy[500:-500], 2 * expected[500:-500], atol=4e-4)

    assert ValidationClips(tmp_path / "dry", limit=2, max_seconds=0.05)[0].noisy.shape == (800,)


def test_a_shared_test_set(shared_folder):
    clips = ValidationClips(shared_folder / "corpus" / "test_set", limit=8)
    assert len(ValidationClips(shared_folder / "corpus" / "test_set")) == 84
    for clip in clips:
        assert clip.noisy.shape == clip.clean.shape
        assert np.corrcoef(clip.noisy, clip.clean)[0, 1] > 0.2


def test_mistakes_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no such"):
        ValidationClips(tmp_path / "nowhere")
    write(tmp_path / "clean_fullband/a.wav", audio(0))
    with pytest.raises(UserError, match=r"no pairs of noisy and clean"):
        ValidationClips(tmp_path)
    write_sources(tmp_path / "packed", "train_clean", {"a": audio(0)})
    with pytest.raises(UserError, match=r"a packed corpus|one of its subsets"):
        ValidationClips(tmp_path / "packed")
    with pytest.raises(UserError, match=r"of kind sources"):
        ValidationClips(tmp_path / "packed" / "train_clean")


def test_files_that_cannot_be_scored(tmp_path):
    write(tmp_path / "noisy/a.wav", audio(0, 3000))
    write(tmp_path / "clean/a.wav", audio(0, 2000))
    with pytest.raises(UserError, match=r"a\.wav has 3000 samples.*2000"):
        ValidationClips(tmp_path)[0]
    write(tmp_path / "clean/a.wav", audio(0, 2950))
    assert ValidationClips(tmp_path)[0].clean.shape == (2950,)
    (tmp_path / "clean/a.wav").write_bytes(b"not audio")
    with pytest.raises(UserError, match=r"clean/a\.wav does not open"):
        ValidationClips(tmp_path)[0]
