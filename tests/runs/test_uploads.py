"""Which mode W&B has, and what waits for it in a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvat_dist.config.schema import TrackConfig
from mvat_dist.errors import UserError
from mvat_dist.io import read_record
from mvat_dist.runs import uploads
from mvat_dist.runs.uploads import Attachment, BestWeights


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("given", "variable", "key", "expected"),
    [
        ("online", "disabled", False, "online"),
        ("offline", "online", True, "offline"),
        ("disabled", "online", True, "disabled"),
        ("auto", "disabled", True, "disabled"),
        ("auto", "offline", True, "offline"),
        ("auto", None, True, "online"),
        ("auto", None, False, "offline"),
    ],
)
def test_the_users_word_counts_before_the_environment_and_that_before_credentials(
    monkeypatch: pytest.MonkeyPatch, given: Any, variable: str | None, key: bool, expected: str
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert uploads.mode(TrackConfig(wandb=given)) == expected


def test_a_mode_that_wandb_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE is 'onlin': set it to online, offline or disabled"):
        uploads.mode(TrackConfig())
    assert uploads.mode(TrackConfig(wandb="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # as W&B called it once
    assert uploads.mode(TrackConfig()) == "offline"


def test_an_attachment_keeps_the_files_of_its_step(tmp_path: Path) -> None:
    sound = tmp_path / "heard.flac"
    sound.write_bytes(b"of step 8")
    (tmp_path / "student").mkdir()
    attachment = Attachment(8, {"examples/00/student": str(sound)}, {}, {"students": [{"a": 1}]})
    uploads.attach(tmp_path / "student", attachment)
    (tmp_path / "next").write_bytes(b"of step 9")
    (tmp_path / "next").replace(sound)
    folder = uploads.attachment_folder(tmp_path / "student", 8)
    stored = read_record(folder / uploads.RECORD, Attachment)
    assert (folder / stored.files["examples/00/student"]).read_bytes() == b"of step 8"
    assert stored.tables == attachment.tables


def test_weights_wait_in_their_order_and_of_too_many_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uploads, "_MOST_ATTACHMENTS", 1)
    file = tmp_path / "model.safetensors"
    (tmp_path / "student").mkdir()
    uploads.attach(tmp_path / "student", Attachment(8))
    for step in (8, 9, 10, 100, 101):
        file.unlink(missing_ok=True)
        file.write_text(str(step))
        uploads.attach_weights(tmp_path / "student", file, step, {"valid/stoi": 0.5})
    folders = uploads.weights_folders(tmp_path / "student")
    records = [read_record(folder / uploads.RECORD, BestWeights) for folder in folders]
    assert [record.step for record in records] == [10, 100, 101]
    assert [(folder / "model.safetensors").read_text() for folder in folders] == ["10", "100", "101"]
    assert caplog.text.count("it will lack best weights") == 1


def test_attachments_wait_in_limited_number_whatever_weights_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uploads, "_MOST_ATTACHMENTS", 2)
    file, student = tmp_path / "model.safetensors", tmp_path / "student"
    file.touch()
    student.mkdir()
    for step in (1, 2, 3, 4):
        uploads.attach_weights(student, file, step, {})
        uploads.attach(student, Attachment(step))
    assert [uploads.attachment_folder(student, step).is_dir() for step in (1, 2, 3, 4)] == [True] * 2 + [
        False
    ] * 2
    assert caplog.text.count("it will lack the sounds") == 1


def test_a_removed_folder_does_not_come_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        uploads.attach(tmp_path / "removed" / "students" / "a", Attachment(8))
    assert not list(tmp_path.iterdir())
