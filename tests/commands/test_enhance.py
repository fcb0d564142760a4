"""Enhancing files, arrays and pipes: what is kept, what is refused; all ways give the same samples."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mvat_dist
from mvat_dist.enhance import main
from mvat_dist.errors import UserError, exit_code
from mvat_dist.inference import enhancer
from mvat_dist.inference.audio_files import Job, enhance_file
from mvat_dist.inference.enhancer import Enhancer
from mvat_dist.inference.overlap_add import cut, join
from mvat_dist.models import weights as modelfile
from mvat_dist.models.weights import LoadedModel
from tests.conftest import REPOSITORY
from tests.networks import tiny_file
from tests.signals import Audio, noise_at, syllables

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_file(tmp_path_factory.mktemp("a model"))


@pytest.fixture(scope="module")
def model(weights) -> Enhancer:
    return mvat_dist.load(weights)


@pytest.fixture
def short_windows(monkeypatch) -> None:
    """Windows of a second, so that a few seconds are a long recording."""
    monkeypatch.setattr(enhancer, "WINDOW_SECONDS", 1.0)
    monkeypatch.setattr(enhancer, "OVERLAP_SECONDS", 0.25)


def noisy_speech(seconds: float, rate: int = 16000, channels: int = 1) -> Audio:
    """(T, C); no two channels are alike."""
    clean = syllables(seconds)
    columns = [(clean + noise_at(clean, 5.0, seed=at)) * 0.8**at for at in range(channels)]
    return np.stack([soxr.resample(one, 16000, rate) for one in columns], axis=1).astype(np.float32)


def run(weights: Path, *options: object) -> int:
    return exit_code(main, ["--model", str(weights), *map(str, options)])


# --- windows --------------------------------------------------------------------------------------


@given(
    total=st.integers(0, 400),
    length=st.integers(20, 60),
    overlap=st.integers(1, 10),
    blocks=st.lists(st.integers(1, 90), min_size=1, max_size=5),
)
def test_windows_that_agree_join_to_what_was_cut(total, length, overlap, blocks):
    stream = np.random.default_rng(0).standard_normal((total, 2)).astype(np.float32)
    edges = np.cumsum([blocks[at % len(blocks)] for at in range(total)])
    pieces = np.split(stream, edges[edges < total])
    windows = list(cut(pieces, length, overlap))
    assert all(len(window.audio) == min(length, total) for window in windows)
    joined = np.concatenate([stream[:0], *join(windows, overlap)])
    np.testing.assert_allclose(joined, stream, atol=1e-6)


def test_a_cross_fade_goes_from_one_window_to_the_next_without_a_step():
    windows = cut([np.zeros((100, 1), np.float32)], 40, 10)
    levels = (window._replace(audio=window.audio + at) for at, window in enumerate(windows))
    joined = np.concatenate(list(join(levels, 10)))[:, 0]
    assert joined.size == 100
    assert (joined[0], joined[-1]) == (0, 2)
    assert 0 < np.diff(joined).max() < 0.2


# --- one pass, and many ---------------------------------------------------------------------------


def test_at_16_khz_a_short_recording_is_one_pass_of_the_network(weights, model):
    noisy = noisy_speech(1.5)
    with torch.no_grad():
        expected = modelfile.load(weights).model(torch.from_numpy(noisy.T)).numpy().T
    # BatchNorm is folded into the convolutions: equal but for the order of sums.
    np.testing.assert_allclose(model.enhance(noisy, 16000), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.enhance(noisy[:, 0], 16000), expected[:, 0], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("short_windows")
def test_batches_of_windows_and_channels_change_nothing(weights, model):
    noisy = noisy_speech(4.2, channels=3)
    several = Enhancer(modelfile.load(weights), batch=4)
    np.testing.assert_allclose(several.enhance(noisy, 16000), model.enhance(noisy, 16000), atol=1e-6)


def test_bf16_is_the_same_but_for_rounding_and_is_not_fp32(weights, model):
    noisy = noisy_speech(1.5)
    half = enhancer.load(weights, "cpu", precision="bf16").enhance(noisy, 16000)
    exact = model.enhance(noisy, 16000)
    error = np.linalg.norm(half - exact) / np.linalg.norm(exact)
    assert half.dtype == np.float32
    assert 1e-6 < error < 0.1  # eight bits of mantissa, through some fifty layers


@pytest.mark.usefixtures("short_windows")
def test_a_quiet_part_is_enhanced_as_if_there_were_no_loud_one(model):
    noisy = noisy_speech(6.0)
    noisy[48000:] *= 0.01  # where a window begins, the fifth
    enhanced, alone = model.enhance(noisy, 16000), model.enhance(noisy[48000:], 16000)
    np.testing.assert_allclose(enhanced[52000:], alone[4000:], rtol=0, atol=1e-6 * np.abs(alone).max())
    # Of one pass that is not so: it divides by the deviation of all it hears.
    whole = model._rows([noisy[:, 0]])[0]
    assert np.abs(whole[52000:] - alone[4000:, 0]).max() > 0.1 * np.abs(alone).max()


def test_resampling_is_as_of_the_whole_at_once(model):
    noisy = noisy_speech(2.0, rate=44100)[:, 0]
    narrow = soxr.resample(noisy, 44100, 16000, quality="VHQ")
    wide = soxr.resample(model.enhance(narrow, 16000), 16000, 44100, quality="VHQ")
    enhanced = model.enhance(noisy, 44100)
    assert enhanced.shape == noisy.shape
    np.testing.assert_allclose(enhanced[: wide.size], wide[: noisy.size], atol=1e-5)


def test_dry_mixes_the_input_in(model):
    noisy = noisy_speech(1.0, rate=48000, channels=2)
    wet = model.enhance(noisy, 48000)
    np.testing.assert_array_equal(model.enhance(noisy, 48000, dry=1.0), noisy)
    np.testing.assert_allclose(model.enhance(noisy, 48000, dry=0.25), 0.75 * wet + 0.25 * noisy, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000])
@pytest.mark.parametrize("samples", [0, 1, 2, 3, 777])
def test_the_shortest_input_keeps_its_length(model, rate, samples):
    channels = 1 if samples == 1 else 2  # more than there are frames are refused
    assert model.enhance(np.full((samples, channels), 0.1, np.float32), rate).shape == (samples, channels)


def test_integers_have_the_full_scale_of_their_type(model):
    pcm = np.round(noisy_speech(0.5)[:, 0] * 32768).astype(np.int16)
    np.testing.assert_array_equal(model.enhance(pcm, 16000), model.enhance(pcm / 32768, 16000))


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.array([0.0, 0.5, np.nan]), 16000, "frame 2 is not finite"),
        (np.array([[0.0, 0.5], [np.inf, 0]]), 16000, "frame 1 is not finite"),
        (np.array([0.0, 1e30]), 16000, "120 dB above full scale"),
        (np.zeros((2, 16000)), 16000, "frames by channels"),
        (np.zeros((2, 1000)), 16000, r"\(2, 1000\), more channels than frames.*\(T, C\)"),
        (np.zeros((2, 3, 4)), 16000, "frames by channels"),
        (np.zeros(3, np.uint8), 16000, "uint8"),
        (np.array([0, 1000, -1000]), 16000, "int16 or int32, and is int64"),
        (np.zeros(3), 0, "0 Hz"),
        (np.zeros(3), float("nan"), "nan Hz"),
        (np.zeros(3), float("inf"), "inf Hz"),
        (np.zeros(3), "16000", "'16000' Hz: it must be a number"),
    ],
)
def test_unusable_arrays_are_refused(model, audio, rate, message):
    with pytest.raises(UserError, match=message) as refused:
        model.enhance(audio, rate)
    assert isinstance(refused.value, ValueError)  # to who calls it from Python


def test_the_package_is_importable_without_torch():
    code = "import mvat_dist, sys; assert callable(mvat_dist.load); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# --- files ----------------------------------------------------------------------------------------

FORMATS = [
    ("a.wav", 16000, 1, {"subtype": "PCM_16"}, 1.1 / 32768),
    ("deep/b.WAV", 48000, 2, {"subtype": "PCM_24", "format": "WAV"}, 1.1 / 2**23),
    ("deep/er/c.flac", 44100, 6, {"subtype": "PCM_16"}, 1.1 / 32768),
    ("d.wav", 8000, 1, {"subtype": "FLOAT"}, 0.0),
    ("e.aiff", 96000, 1, {"subtype": "PCM_24"}, 1.1 / 2**23),
    ("f.wav", 22050, 1, {"subtype": "DOUBLE", "endian": "BIG"}, 0.0),
    ("g.ogg", 44100, 2, {"subtype": "VORBIS"}, None),
    ("h.mp3", 44100, 1, {}, None),
    ("i.au", 11025, 1, {"subtype": "ULAW"}, None),
]
"""Name, rate, channels, what soundfile writes, and the step of its samples; None for lossy formats."""


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, rate, channels, kind, _ in FORMATS:
        file = tmp_path / "some files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, noisy_speech(0.7, rate, channels), rate, **kind)
    (tmp_path / "some files" / "notes.txt").write_text("not audio, and not taken for it")
    return tmp_path / "some files"


def everything(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_a_folder_keeps_its_tree_and_every_file_its_kind(weights, model, folder, tmp_path):
    out = tmp_path / "out here"
    assert run(weights, folder, "--out", out) == 0
    assert everything(out) == sorted(name for name, *_ in FORMATS)
    for name, _, _, _, step in FORMATS:
        before, after = soundfile.info(folder / name), soundfile.info(out / name)
        for what in ("samplerate", "channels", "frames", "format", "subtype", "endian"):
            assert getattr(after, what) == getattr(before, what), (name, what)
        noisy, rate = soundfile.read(folder / name, dtype="float32")
        found = soundfile.read(out / name, dtype="float32")[0]
        expected = model.enhance(noisy, rate)
        if step is None:
            # A codec of its own loudness would show here.
            assert np.std(found) == pytest.approx(np.std(expected), rel=0.1)
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=step)


def test_processes_write_what_one_process_writes(weights, folder, tmp_path):
    kept = [folder / name for name in ("a.wav", "deep/er/c.flac", "e.aiff")]
    assert run(weights, *kept, "--out", tmp_path / "one") == 0
    assert run(weights, *kept, "--out", tmp_path / "two", "--processes", 2) == 0
    assert everything(tmp_path / "two") == everything(tmp_path / "one") == ["a.wav", "c.flac", "e.aiff"]
    for name in everything(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_bad_files_are_named_and_the_others_done(weights, tmp_path, capsys):
    bad = tmp_path / "in"
    bad.mkdir()
    speech = noisy_speech(1.0)
    soundfile.write(bad / "good.wav", speech, 16000)
    soundfile.write(bad / "whole.flac", noisy_speech(6.0), 16000)
    soundfile.write(bad / "silence.wav", np.zeros((4000, 2)), 16000)
    soundfile.write(bad / "empty.wav", np.zeros((0, 2)), 16000)
    (bad / "text.wav").write_text("hello")
    (bad / "nothing.wav").touch()
    content = (bad / "whole.flac").read_bytes()
    (bad / "torn.flac").write_bytes(content[: len(content) // 2])
    speech[7] = np.nan
    soundfile.write(bad / "nan.wav", speech, 16000, subtype="FLOAT")
    out = tmp_path / "out"
    assert run(weights, bad, "--out", out) == 2
    error = capsys.readouterr().err
    for name in ("text.wav", "nothing.wav", "torn.flac", "nan.wav"):
        assert error.count(f"error: {bad / name}") == 1
    assert "error: 4 of 8 files could not be enhanced" in error
    assert everything(out) == ["empty.wav", "good.wav", "silence.wav", "whole.flac"]
    assert not soundfile.read(out / "silence.wav")[0].any()
    assert soundfile.info(out / "empty.wav").frames == 0


def test_what_is_there_stays_unless_it_is_to_be_overwritten(weights, folder, tmp_path, capsys):
    assert run(weights, folder / "a.wav", "--out", tmp_path) == 0
    (tmp_path / "a.wav").write_text("mine")
    assert run(weights, folder / "a.wav", "--out", tmp_path) == 0
    assert (tmp_path / "a.wav").read_text() == "mine"
    assert "1 were there already" in capsys.readouterr().err
    assert run(weights, folder / "a.wav", "--out", tmp_path, "--overwrite") == 0
    assert soundfile.info(tmp_path / "a.wav").frames == soundfile.info(folder / "a.wav").frames


def test_an_out_folder_inside_the_input_is_not_input(weights, folder):
    assert run(weights, folder, "--out", folder / "enhanced") == 0
    assert run(weights, folder, "--out", folder / "enhanced") == 0
    assert not (folder / "enhanced" / "enhanced").exists()


class Amplifier(nn.Module):
    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return 3 * noisy


def test_beyond_full_scale_integers_are_clipped_and_counted(tmp_path):
    pcm = np.round(np.clip(3 * noisy_speech(0.5), -0.9, 0.9) * 32768).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", pcm, 16000)
    louder = Enhancer(LoadedModel("louder", Amplifier(), None))
    job = Job(tmp_path / "a.wav", tmp_path / "out" / "a.wav")
    clipped = enhance_file(louder, job, 0.0, lambda _: None).clipped
    assert clipped == (np.abs(3 * pcm.astype(int)) > 32768).sum() > 0
    found = soundfile.read(job.target, dtype="int16", always_2d=True)[0]
    np.testing.assert_array_equal(found, np.clip(3 * pcm.astype(int), -32768, 32767))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["FOLDER", "--out", "FOLDER"], "is an input"),
        (["FOLDER/a.wav", "FOLDER/deep/../a.wav", "FOLDER/copy/a.wav", "--out", "OUT"], "would both become"),
        (["FOLDER/none.wav", "--out", "OUT"], "no such file"),
        (["FOLDER/nothing", "--out", "OUT"], "no audio files"),
        (["FOLDER"], "--out DIR"),
        (["FOLDER", "--out", "FOLDER/a.wav"], "choose another place"),
        (["FOLDER", "--out", "OUT", "--dry", "1.5"], "--dry is 1.5"),
        (["FOLDER", "--out", "OUT", "--processes", "0"], "--processes is 0"),
        (["FOLDER", "-", "--out", "OUT"], "standard input"),
        (["", "--out", "OUT"], "the path is empty"),
        (["FOLDER", "--out", ""], "the path is empty"),
        (["FOLDER/a.wav", "--out", "-"], "a pipe is read with - as the input"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    weights, folder, tmp_path, capsys, options, message
):
    (folder / "nothing").mkdir()
    (folder / "copy").mkdir()
    soundfile.write(folder / "copy" / "a.wav", np.zeros(100), 16000)
    named = [one.replace("FOLDER", str(folder)).replace("OUT", str(tmp_path / "out")) for one in options]
    before = everything(tmp_path)
    assert run(weights, *named) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert everything(tmp_path) == before


# --- pipes ----------------------------------------------------------------------------------------


def test_a_pipe_gives_what_the_model_gives(weights, model):
    pcm = np.round(noisy_speech(17.0, channels=2) * 32768).astype("<i2")  # longer than a window
    command = [sys.executable, "-m", "mvat_dist.enhance", "--model", weights, "--channels", "2", "-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=pcm.tobytes(), stdout=subprocess.PIPE, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0
    found = np.frombuffer(done.stdout, "<i2").reshape(-1, 2) / 32768
    np.testing.assert_allclose(found, model.enhance(pcm, 16000), rtol=0, atol=0.51 / 32768)


@pytest.mark.parametrize(
    ("content", "written", "message"),
    [
        (b"RIFF....WAVEfmt " + bytes(1000), 0, "error: standard input begins as a sound file"),
        (bytes(4001), 4000, "error: standard input ended within a frame (1 bytes left)"),
        (b"", 0, ""),
    ],
)
def test_a_pipe_refuses_a_sound_file_and_half_a_frame(
    weights, monkeypatch, capsysbinary, content, written, message
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert run(weights, "-", "--channels", "2") == (2 if message else 0)
    captured = capsysbinary.readouterr()
    assert len(captured.out) == written
    assert message in captured.err.decode()


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_a_pipe_with_a_closed_end_is_one_line(weights, monkeypatch, capsys, closed):
    monkeypatch.setattr(sys, closed, None)  # as Python has it for `<&-`
    assert run(weights, "-") == 2
    assert "is closed" in capsys.readouterr().err
