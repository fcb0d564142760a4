"""What is written is whole or absent, and a disk that refuses it is named in one line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mvat_dist import io
from mvat_dist.errors import UserError
from mvat_dist.io import make_folder

WRITE = """
import json, resource, sys
from pathlib import Path
import numpy as np
import soundfile
from safetensors.numpy import save_file
from mvat_dist.errors import UserError, exit_code
from mvat_dist.io import atomic_directory, atomic_file

folder, limit, writer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
# Noise, so that FLAC cannot make it small.
samples = np.random.default_rng(0).uniform(-1, 1, 1_000_000).astype(np.float32)
def refuse(_):
    raise UserError("no such corpus")
writers = {
    "bytes": lambda path: path.write_bytes(samples.tobytes()),
    "numpy": lambda path: np.save(path.open("wb"), samples),
    "safetensors": lambda path: save_file({"a": samples}, path),
    "wav": lambda path: soundfile.write(path, samples, 16_000, format="WAV"),
    "flac": lambda path: soundfile.write(path, samples, 16_000, format="FLAC"),
    "refusal": refuse,
    "defect": lambda path: path.write_bytes(bytes(10)) and {}["missing"],
}
def file(_):
    with atomic_file(folder / "made") as temporary:
        writers[writer](temporary)
def directory(_):
    with atomic_directory(folder / "made") as temporary:
        (temporary / "small").write_text("it fits")
        (temporary / "deep").mkdir()
        writers[writer](temporary / "deep" / "large")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
codes = [exit_code(file), exit_code(directory)]
print(json.dumps([codes, [str(path) for path in folder.iterdir()]]))
"""
WRITERS = ["bytes", "numpy", "safetensors", "wav", "flac"]


def write(folder: Path, limit: int, writer: str, *before: str) -> subprocess.CompletedProcess[str]:
    """Write a file and then a directory in another process, below a limit of the file size in bytes."""
    command = [*before, sys.executable, "-c", WRITE, str(folder), str(limit), writer]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_size_limit_is_one_line_and_exit_code_2(tmp_path: Path, writer: str) -> None:
    ended = write(tmp_path, 100_000, writer)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [[2, 2], []]
    line = f"error: the file-size limit is reached at {tmp_path / 'made'}: raise `ulimit -f`"
    assert [told[: len(line)] for told in ended.stderr.splitlines()] == [line, line]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_exit_code_2(tmp_path: Path, writer: str) -> None:
    # A disk of one megabyte in a mount name space of its own, which ends with the process.
    own = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    mount = f"mount -t tmpfs -o size=1m tmpfs '{tmp_path}'"
    try:
        subprocess.run([*own, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine lets no test mount a small disk: {error}")
    ended = write(tmp_path, 0, writer, *own, f'{mount} && exec "$@"', "sh")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [[2, 2], []]
    line = f"error: the disk is full at {tmp_path / 'made'}: free space"
    assert [told[: len(line)] for told in ended.stderr.splitlines()] == [line, line]


def test_a_refusal_below_a_file_size_limit_keeps_its_words(tmp_path: Path) -> None:
    ended = write(tmp_path, 1_000, "refusal")
    assert json.loads(ended.stdout) == [[2, 2], []]
    assert ended.stderr.splitlines() == ["error: no such corpus"] * 2


def test_a_defect_keeps_its_traceback_and_leaves_nothing(tmp_path: Path) -> None:
    ended = write(tmp_path, 0, "defect")
    assert ended.returncode == 1
    assert "KeyError: 'missing'" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_replaces_the_one_before_it_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with io.atomic_directory(tmp_path / "made") as temporary:
            (temporary / name).write_text(name)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["made", "made/second"]


def test_a_folder_is_locked_where_only_files_can_be(tmp_path: Path, monkeypatch) -> None:
    """As over NFS, which refuses an exclusive lock to who cannot write."""
    flock = fcntl.flock

    def of_files(descriptor: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", of_files)
    with (
        io.only_writer(tmp_path, "filling it"),
        pytest.raises(UserError, match="another process is filling it"),
        io.only_writer(tmp_path, "filling it"),
    ):
        pytest.fail("two writers")
    with io.only_writer(tmp_path, "filling it"):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from mvat_dist.io import scratch_directory

with scratch_directory(Path(sys.argv[1]), sys.argv[2]) as scratch:
    (scratch / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_scratch_directory_goes_at_the_end_and_takes_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in ("export", "other"):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), name], check=False)
    (tmp_path / "kept").write_text("kept")
    assert len(list(tmp_path.iterdir())) == 3
    with io.scratch_directory(tmp_path, "export") as scratch:
        assert list(scratch.iterdir()) == []
        assert len(list(tmp_path.iterdir())) == 3
        (scratch / "half").write_text("half")
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 2
    assert "kept" in left
    assert any(name.startswith(".other.") for name in left)


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_sha256_is_the_digest_of_the_content(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert io.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("place", ["/proc/nowhere/folder", "{file}/folder"])
def test_a_place_that_cannot_hold_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(UserError, match="cannot make the folder"):
        make_folder(Path(place.format(file=file)))


@dataclass
class Part:
    name: str
    share: float


@dataclass
class Example:
    """A record with a format version."""

    step: int
    parts: dict[str, Part] = field(default_factory=dict)
    place: tuple[int, ...] = ()
    state: str | None = None
    format: str = "mvat_dist.example.2"


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    example = Example(3, {"base": Part("base", 0.5)}, (1, 2))
    io.write_record(tmp_path / "example.json", example)
    assert io.read_record(tmp_path / "example.json", Example) == example


def test_a_container_of_records_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "parts.json").write_text('{"base": {"name": "base", "share": 1}}')
    assert io.read_record(tmp_path / "parts.json", dict[str, Part]) == {"base": Part("base", 1.0)}


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": "mvat_dist.example.2"}', "step"),
        ('{"format": "mvat_dist.example.2", "step": "3"}', "step"),
        ('{"format": "mvat_dist.example.2", "step": 3, "parts": {"base": {"name": 1}}}', "parts.base.name"),
        ('{"format": "mvat_dist.example.1", "step": 3}', "'mvat_dist.example.1'"),
        ('{"step": 3}', "'mvat_dist.example.2'"),
        ("\udcff", "damaged"),
    ],
)
def test_a_damaged_or_old_record_is_refused_with_its_file_and_key(
    content: str, names: str, tmp_path: Path
) -> None:
    file = tmp_path / "example.json"
    file.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(UserError) as refusal:
        io.read_record(file, Example)
    assert str(file) in str(refusal.value)
    assert names in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_pydantic_is_not_imported_with_the_module() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, mvat_dist.io; sys.exit('pydantic' in sys.modules)"], check=True
    )
