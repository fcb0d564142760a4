"""Files that promise what they do not hold, names that no program likes, and ends in the midst of work."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mvat_dist.enhance import main
from mvat_dist.errors import exit_code
from mvat_dist.inference import graph
from mvat_dist.inference.audio_files import duration
from mvat_dist.models import weights as modelfile
from tests.conftest import REPOSITORY
from tests.networks import tiny_file
from tests.signals import noise_at, streamed, syllables
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_file(tmp_path_factory.mktemp("a model"))


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """A sound file of 3 s."""
    file = tmp_path_factory.mktemp("speech") / "a.wav"
    clean = syllables(3.0)
    soundfile.write(file, clean + noise_at(clean, 5.0), 16000)
    return file


def run(weights: Path, *options: object) -> int:
    return exit_code(main, ["--model", str(weights), *map(str, options)])


# --- what there is to enhance ---------------------------------------------------------------------


def test_the_folder_around_the_input_can_take_the_output(weights, speech, tmp_path):
    (tmp_path / "talks" / "monday").mkdir(parents=True)
    shutil.copy(speech, tmp_path / "talks" / "monday" / "a.wav")
    assert run(weights, tmp_path / "talks" / "monday", "--out", tmp_path / "talks") == 0
    assert (tmp_path / "talks" / "a.wav").is_file()


def test_linked_folders_are_followed_once(weights, speech, tmp_path):
    for name in ("in", "elsewhere"):
        (tmp_path / name).mkdir()
    shutil.copy(speech, tmp_path / "elsewhere" / "a.wav")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert run(weights, tmp_path / "in", "--out", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out" / "link").iterdir()] == ["a.wav"]


def test_a_named_pipe_is_refused_and_not_waited_for(weights, tmp_path, capsys):
    os.mkfifo(tmp_path / "f.wav")
    assert run(weights, tmp_path / "f.wav", "--out", tmp_path / "out") == 2
    assert f"{tmp_path / 'f.wav'} is no regular file: pipe raw PCM through -" in capsys.readouterr().err


def test_a_name_that_no_file_can_have_is_refused(weights, tmp_path, capsys):
    assert run(weights, "a.wav " * 100, "--out", tmp_path / "out") == 2
    assert "error: the name is too long" in capsys.readouterr().err


# --- lengths --------------------------------------------------------------------------------------


def test_a_wav_of_more_than_its_sizes_can_say_is_refused(weights, speech, tmp_path, capsys):
    """As ffmpeg and pipes write it: libsndfile would give the first part of it, and say nothing."""
    file = tmp_path / "long.wav"
    content = bytearray(speech.read_bytes()[:44])
    content[4:8] = content[40:44] = b"\xff" * 4
    file.write_bytes(content)
    os.truncate(file, 5 << 30)  # a hole, which takes no space
    assert run(weights, file, "--out", tmp_path / "out") == 2
    assert "longer than the 4 GB of a WAV: convert it to RF64, W64 or FLAC" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def streamed_flac(speech, tmp_path) -> Path:
    soundfile.write(tmp_path / "whole.flac", soundfile.read(speech)[0], 16000)
    file = tmp_path / "streamed.flac"
    file.write_bytes(streamed((tmp_path / "whole.flac").read_bytes()))
    assert soundfile.info(file).frames > 2**60  # libsndfile's answer
    return file


def test_a_flac_that_leaves_its_length_open_is_read_to_its_end(
    weights, speech, streamed_flac, tmp_path, capsys
):
    assert duration(streamed_flac) is None
    assert duration(speech) == 3.0
    assert run(weights, streamed_flac, tmp_path / "whole.flac", "--out", tmp_path / "out") == 0
    found, expected = (soundfile.read(tmp_path / "out" / f"{name}.flac")[0] for name in ("streamed", "whole"))
    np.testing.assert_array_equal(found, expected)
    said = capsys.readouterr().err
    assert "6 s of audio" in said  # of the bar, which has no end
    assert not re.search(r"\d{7}", said)
    assert "warning" not in said


def test_the_example_reads_it_too(weights, streamed_flac, tmp_path):
    pytest.importorskip("onnx")
    graph.save_onnx(modelfile.load(weights).model, tmp_path / "tiny.onnx", {})
    example = REPOSITORY / "docs" / "examples" / "enhance_onnx.py"
    command = [sys.executable, example, "tiny.onnx", streamed_flac, "enhanced.flac"]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert run(weights, tmp_path / "whole.flac", "--out", tmp_path / "out") == 0
    found, expected = (soundfile.read(tmp_path / one)[0] for one in ("enhanced.flac", "out/whole.flac"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 / 32768)


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        ("tiny.onnx", "nowhere.wav", "No such file or directory: 'nowhere.wav'"),
        ("nowhere.onnx", "notes.wav", "No such file or directory: 'nowhere.onnx'"),
        ("tiny.onnx", "notes.wav", "Error opening 'notes.wav': Format not recognised."),
        ("notes.wav", "notes.wav", "notes.wav cannot be read as ONNX"),
    ],
)
def test_the_example_refuses_in_one_line(weights, tmp_path, model, source, message):
    pytest.importorskip("onnx")
    graph.save_onnx(modelfile.load(weights).model, tmp_path / "tiny.onnx", {})
    (tmp_path / "notes.wav").write_text("no audio, and no graph")
    example = REPOSITORY / "docs" / "examples" / "enhance_onnx.py"
    command = [sys.executable, example, model, source, "enhanced.wav"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.wav", {"subtype": "PCM_16"}),
        ("a.aiff", {"subtype": "PCM_24"}),
        ("a.au", {"subtype": "PCM_16"}),
        ("a.w64", {"subtype": "FLOAT"}),
        ("a.rf64", {"subtype": "PCM_16", "format": "RF64"}),
        ("a.mp3", {}),
        ("a.ogg", {"subtype": "VORBIS"}),
        ("b.ogg", {"subtype": "OPUS"}),
    ],
)
def test_what_was_cut_off_is_said_to_be(weights, speech, tmp_path, capsys, name, kind):
    whole, cut = tmp_path / name, tmp_path / f"cut-{name}"
    soundfile.write(whole, soundfile.read(speech)[0], 16000, **kind)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    assert run(weights, whole, cut, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert f"warning: {cut} was cut off" in said
    assert 0.5 < soundfile.info(tmp_path / "out" / cut.name).duration < 2.5


def test_a_wav_from_a_pipe_is_not_taken_for_cut_off(weights, speech, tmp_path, capsys):
    content = bytearray(speech.read_bytes())
    size = content.index(b"data") + 4
    content[4:8] = content[size : size + 4] = b"\xff\xff\xff\xff"  # what ffmpeg writes
    (tmp_path / "piped.wav").write_bytes(content)
    assert run(weights, tmp_path / "piped.wav", "--out", tmp_path / "out") == 0
    assert "warning" not in capsys.readouterr().err
    assert soundfile.info(tmp_path / "out" / "piped.wav").duration == 3.0


def test_a_format_that_cannot_be_empty_is_refused_without_samples(weights, tmp_path, capsys):
    soundfile.write(tmp_path / "some.flac", np.zeros(100), 16000)
    content = (tmp_path / "some.flac").read_bytes()
    audio = content.index(b"\xff\xf8")  # where the first frame begins
    (tmp_path / "none.flac").write_bytes(streamed(content[:audio]))
    assert run(weights, tmp_path / "none.flac", "--out", tmp_path / "out") == 2
    assert f"error: {tmp_path / 'none.flac'}" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


# --- names and places -----------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_awkward_names_are_enhanced_and_what_cannot_be_is_one_line(
    weights, speech, tmp_path, capsys, processes
):
    names = [b"x" * 251 + b".wav", b"caf\xe9.wav", b"fine.wav", b"taken.wav"]
    source, out = tmp_path / "in", tmp_path / "out"
    (out / "taken.wav").mkdir(parents=True)
    source.mkdir()
    for name in names:
        (source / os.fsdecode(name)).write_bytes(speech.read_bytes())
    (source / "bare.raw").write_bytes(bytes(100))
    options = [source, source / "bare.raw", "--out", out, "--processes", processes]
    for overwrite in ([], ["--overwrite"]):
        assert run(weights, *options, *overwrite) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 3
        assert any("a folder is in the place of" in line and "taken.wav" in line for line in lines)
        assert any("bare.raw" in line and "raw samples" in line for line in lines)
        assert "2 of 5" in lines[-1] or "2 of 2" in lines[-1]
    assert {os.fsencode(file.name) for file in out.iterdir()} == {*names}
    for name in names[:3]:
        # As bytes: soundfile takes no name that is not UTF-8.
        assert soundfile.info(os.fsencode(out) + b"/" + name).frames == 48000


def without_privileges() -> list[str]:
    """What to put before a command for which permissions hold, as they do not for root."""
    if os.geteuid() != 0:
        return []
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("root without setpriv may read and write everything")
    return command


def test_what_may_not_be_read_or_written_is_named_for_what_it_is(weights, speech, tmp_path):
    source, out, locked = tmp_path / "in", tmp_path / "out", tmp_path / "locked"
    for folder in (source / "sub", out / "sub", locked):
        folder.mkdir(parents=True)
    for name in ("a.wav", "secret.wav", "sub/b.wav"):
        shutil.copy(speech, source / name)
    (source / "secret.wav").chmod(0)
    (out / "sub").chmod(0o555)
    locked.chmod(0o555)
    command = [*without_privileges(), sys.executable, "-m", "mvat_dist.enhance", "--model", weights, source]

    def refusals(place: Path) -> list[str]:
        done = subprocess.run([*command, "--out", place], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 2
        assert ".tmp" not in done.stderr
        return re.findall("error: .*", done.stderr)

    assert refusals(out) == [
        f"error: {source}/secret.wav: cannot be read (permission denied)",
        f"error: {source}/sub/b.wav: the folder {out}/sub cannot be written (permission denied): allow it or "
        "choose another --out",
        "error: 2 of 3 files could not be enhanced",
    ]
    assert (out / "a.wav").exists()
    # Once, and not for every file.
    assert refusals(locked) == [
        f"error: the folder {locked} cannot be written (permission denied): allow it or choose another --out"
    ]


@pytest.mark.parametrize("later", [False, True])
def test_a_read_only_file_system_is_named_and_no_temporary_file(
    weights, speech, tmp_path, monkeypatch, capsys, later
):
    out = tmp_path / "out"

    def mounted_read_only(path: object, flags: int, *more: object, **options: object) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        # A mount falls back to read-only after an error: at once, or when the first file is begun.
        if writes and str(path).startswith(str(out)) and (not later or str(path) != str(out)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return honest(path, flags, *more, **options)

    honest = os.open
    monkeypatch.setattr(os, "open", mounted_read_only)
    assert run(weights, speech, "--out", out) == 2
    said = capsys.readouterr().err
    assert f"the folder {out} cannot be written (read-only file system)" in said
    assert (f"error: {speech}: " in said) == later
    assert ".tmp" not in said


@pytest.mark.parametrize(("name", "kind"), [("tiny.pt", "TorchScript"), ("tiny.onnx", "ONNX")])
def test_an_exported_graph_is_no_model_and_is_called_what_it_is(
    weights, speech, tmp_path, capsys, recwarn, name, kind
):
    model = modelfile.load(weights).model
    if kind == "ONNX":
        pytest.importorskip("onnx")
        graph.save_onnx(model, tmp_path / name, {})
    else:
        graph.save_torchscript(model, tmp_path / name, "abc")
    recwarn.clear()
    assert run(tmp_path / name, speech, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / name}: this is an exported {kind} file: give the .safetensors beside it, or the "
        "run\n"
    )
    assert not recwarn.list


# --- the end --------------------------------------------------------------------------------------


@pytest.fixture
def endless(tmp_path) -> Path:
    """Folder with two recordings of nine hours each, of digital silence that takes no room."""
    folder = tmp_path / "endless"
    folder.mkdir()
    for name in ("a.wav", "b.wav"):
        soundfile.write(folder / name, np.zeros(0), 16000, subtype="PCM_16")
        with (folder / name).open("r+b") as file:
            file.seek(40)
            file.write((10**9).to_bytes(4, "little"))
            file.truncate(44 + 10**9)
    return folder


@pytest.mark.parametrize(
    ("processes", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGHUP), (2, signal.SIGTERM), (2, signal.SIGINT)],
)
def test_a_signal_leaves_nothing_half_written(weights, endless, tmp_path, processes, number):
    out = tmp_path / "out"
    # Whoever started pytest may have had it ignore some of them, as `nohup` and a shell's `&` do.
    heeding = ["env", "--default-signal=HUP,INT,TERM", sys.executable]
    command = [*heeding, "-m", "mvat_dist.enhance", "--model", weights, endless, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        [*command, "--processes", str(processes)],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: len(list(out.glob(".*.tmp"))) == processes, 120, "nothing was begun")
        begun.send_signal(number)  # to it alone, not to the processes that it started
        said = begun.communicate(timeout=60)[1]
    finally:
        begun.kill()
    assert begun.returncode == 128 + number
    assert not list(out.iterdir())
    assert "Traceback" not in said


def test_what_nohup_ignores_stays_ignored(weights, endless, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mvat_dist.enhance", "--model", weights, endless, "--out", out]
    begun = subprocess.Popen(["nohup", *command], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: list(out.glob(".*.tmp")) != [], 120, "nothing was begun")
        begun.send_signal(signal.SIGHUP)
        begun.send_signal(signal.SIGTERM)
        said = begun.communicate(timeout=60)[1]
    finally:
        begun.kill()
    assert begun.returncode == 128 + signal.SIGTERM
    assert "ended by SIGTERM" in said


def test_what_a_killed_run_left_goes_with_the_next_and_what_others_write_stays(
    weights, endless, speech, tmp_path, capsys
):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mvat_dist.enhance", "--model", weights, endless, "--out", out]
    begun = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        until(lambda: list(out.glob(".*.tmp")) != [], 120, "nothing was begun")
    finally:
        begun.kill()
        begun.wait()
    (left,) = out.iterdir()
    assert f".{begun.pid}." in left.name
    others = {
        left.name.replace(f".{begun.pid}.", ".1."),  # of a process that runs
        left.name.replace(f".{begun.pid}.", f".elsewhere.{begun.pid}."),  # of another host
        left.name.replace("a.wav", "c.wav"),  # of another target
        ".a.wav.tmp",
    }
    for name in others:
        (out / name).touch()
    shutil.copy(speech, endless / "a.wav")
    assert run(weights, endless / "a.wav", "--out", out) == 0
    assert {entry.name for entry in out.iterdir()} == {*others, "a.wav"}
    assert "note: 1 files that a killed run left half written are removed" in capsys.readouterr().err
