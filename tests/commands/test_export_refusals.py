"""What an export refuses or leaves out: it says so, and nothing else in the folder tells another story."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

import mvat_dist.inference.export
from mvat_dist.errors import exit_code
from mvat_dist.export import main
from mvat_dist.inference.provenance import fingerprint_of
from mvat_dist.models import weights as modelfile
from mvat_dist.runs.weights import resolve
from tests.conftest import REPOSITORY
from tests.export_runs import a_run, a_test_set
from tests.mistakes import assert_refused
from tests.networks import TINY, loud
from tests.score_records import score
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "a run")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return a_test_set(tmp_path_factory.mktemp("some clips"))


def options(model: Path, clips: Path, out: Path, formats: str) -> list[str]:
    return ["--model", str(model), "--data", str(clips), "--out", str(out), "--formats", formats]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# --- what an earlier export left ------------------------------------------------------------------


def test_files_of_other_weights_are_named(run, clips, tmp_path, capsys):
    everything = "safetensors,fp16,torchscript,onnx"
    other = tmp_path / "other.safetensors"
    weights = loud(TINY).state_dict()
    weights = {key: value * 1.5 if value.is_floating_point() else value for key, value in weights.items()}
    modelfile.save(other, weights, name="tiny", size=TINY, step=1)
    out = tmp_path / "out"
    assert exit_code(main, options(run, clips, out, everything)) == 0
    before = modelfile.fingerprint(modelfile.load(resolve(run)).model)
    for file in out.iterdir():
        assert file.suffix == ".md" or fingerprint_of(file) == before
    (out / "tiny.pt").write_text("torn")
    capsys.readouterr()
    assert exit_code(main, options(run, clips, out, "safetensors")) == 0  # the same weights once more
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("note: ")] == [
        f"note: {out / 'tiny.pt'}, of an earlier export, does not say of which weights it is: remove "
        "it or export it again"
    ]
    assert exit_code(main, options(other, clips, out, "safetensors")) == 0
    said = capsys.readouterr().err
    for name in ("tiny.fp16.safetensors", "tiny.onnx"):
        assert f"note: {out / name}, of an earlier export, is of other weights (SHA-256 {before})" in said
    assert "tiny.safetensors, of" not in said


@pytest.mark.parametrize("taken", ["tiny.pt", "tiny.md"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_changes(
    run, clips, tmp_path, capsys, taken
):
    (tmp_path / taken).mkdir()
    assert_refused(main, options(run, clips, tmp_path, "safetensors,torchscript"), taken, capsys)
    assert names(tmp_path) == [taken]


# --- damaged runs ---------------------------------------------------------------------------------

DAMAGES = [
    ("evaluate/shards-best/scores.json", '{"weights": "best", "sec', {"scores"}),
    ("evaluate/shards-best/scores.json", "[]", {"scores"}),
    ("evaluate/shards-best/scores.json", '{"weights":"best"}', {"scores"}),
    (
        "evaluate/shards-best/scores.json",
        '{"format": "mvat_dist.scores.2", "weights":"best", "inputs": {"networks": {"tiny": "SHA256"}}, '
        '"sections": {"a": {"scores": {"tiny": {"pesq_wb": {"mean": 1}}}}}}',
        {"scores"},
    ),
    ("config.yaml", "a: [1", {"config"}),
    ("config.yaml", "a: 1", {"config"}),
    ("config.yaml", "\xff", {"config"}),
    ("inputs.json", "{}", {"inputs"}),
    ("inputs.json", '{"data": {}, "teacher": "someone"}', {"inputs"}),
    ("environment.json", "[]", {"environment"}),
]


@pytest.mark.parametrize(("record", "content", "lost"), DAMAGES)
def test_a_damaged_record_is_left_out_and_named(run, clips, tmp_path, capsys, record, content, lost):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    content = content.replace("SHA256", modelfile.fingerprint(loud(TINY)))
    (damaged / record).write_bytes(content.encode("latin-1"))
    out = tmp_path / "out"
    assert exit_code(main, options(damaged, clips, out, "safetensors")) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert f"note: {damaged / record} cannot be read" in notes[0]
    about = modelfile.load(out / "tiny.safetensors").about
    assert {"config", "inputs", "environment", "scores"} - about.keys() == lost
    assert "## Scores" in (out / "tiny.md").read_text()


def test_scores_of_other_weights_are_not_taken_for_those_of_these(run, clips, tmp_path, capsys):
    """As when a run was evaluated, and went on to better weights."""
    gone_on = tmp_path / "gone on"
    shutil.copytree(run, gone_on)
    scores = gone_on / "evaluate" / "shards-best" / "scores.json"
    scores.write_text(scores.read_text().replace(modelfile.fingerprint(loud(TINY)), "0" * 64))
    main(options(gone_on, clips, tmp_path / "out", "safetensors"))
    assert f"{scores} has no scores of these weights of tiny" in capsys.readouterr().err
    assert "scores" not in modelfile.load(tmp_path / "out" / "tiny.safetensors").about


def test_a_card_is_written_for_a_file_whose_origin_is_illegible(clips, tmp_path):
    model = tmp_path / "tiny.safetensors"
    about = {"config": "a: 1", "scores": "[1]", "inputs": "no JSON"}
    modelfile.save(model, loud(TINY).state_dict(), name="tiny", size=TINY, step=1, about=about)
    assert exit_code(main, options(model, clips, tmp_path / "out", "safetensors")) == 0
    assert (tmp_path / "out" / "tiny.md").read_text().count("cannot be read") == 2


def test_a_mean_without_an_interval_and_a_damaged_table_hide_no_other_scores(clips, tmp_path):
    model = tmp_path / "tiny.safetensors"
    mean, interval, none = (asdict(score(*known)) for known in ((2.4,), (2.5, 0.25), (None,)))
    scores = {
        "one": {"a": {"tiny": {"pesq_wb": mean}}},
        "damaged": {"b": {"tiny": {"pesq_wb": {"mean": 2.3}}}, "c": {"tiny": {"pesq_wb": interval}}},
        "more damaged": 7,
        "none": {"d": {"tiny": {"pesq_wb": none}}},
    }
    about = {"scores": json.dumps(scores)}
    modelfile.save(model, loud(TINY).state_dict(), name="tiny", size=TINY, step=1, about=about)
    assert exit_code(main, options(model, clips, tmp_path / "out", "safetensors")) == 0
    card = (tmp_path / "out" / "tiny.md").read_text()
    found = card.split("## Scores\n\n")[1].split("Higher is better")[0]
    told = [
        " ".join(line.split()) for line in found.splitlines() if line and not re.match(r"\|[-:| ]*$", line)
    ]
    assert [line for line in told if "PESQ" not in line] == [
        "a of one",
        "| tiny | 2.40 |",
        "What the file that was exported says of b of damaged cannot be read.",
        "c of damaged",
        "| tiny | 2.50 [2.25, 2.75] |",
        "What the file that was exported says of more damaged cannot be read.",
        "d of none",
        "| tiny | - |",
    ]


def test_without_a_card_there_are_no_files(run, clips, tmp_path, monkeypatch):
    def fails(*_: object) -> str:
        raise RuntimeError("no card")

    monkeypatch.setattr(mvat_dist.inference.export, "card", fails)
    with pytest.raises(RuntimeError, match="no card"):
        main(options(run, clips, tmp_path, "safetensors"))
    assert names(tmp_path) == []


# --- clips ----------------------------------------------------------------------------------------


def test_clips_that_verify_nothing_are_left_out_by_name(run, clips, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    samples = soundfile.info(data / "clean" / "1.wav").frames
    soundfile.write(data / "noisy" / "1.wav", np.zeros(samples), 16000)
    (data / "noisy" / "2.wav").write_text("no audio")
    out = tmp_path / "out"
    assert exit_code(main, options(run, data, out, "safetensors")) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: clip")]
    assert len(notes) == 2
    assert "1.wav is left out: it is silent" in notes[0]
    assert "2.wav is left out: " in notes[1]
    for clip in data.glob("*/*.wav"):
        soundfile.write(clip, np.zeros(32000), 16000)
    assert exit_code(main, options(run, data, tmp_path / "none", "safetensors")) == 2
    assert "has no clip to check on" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none").exists()


# --- the end --------------------------------------------------------------------------------------


def test_a_signal_leaves_nothing_half_written(run, clips, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mvat_dist.export",
        *options(run, clips, tmp_path, "torchscript,onnx"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: list(tmp_path.glob(".*.tmp")) != [], 120, "nothing was begun")
        begun.send_signal(signal.SIGTERM)
        begun.wait(timeout=60)
    finally:
        begun.kill()
    assert begun.returncode == 128 + signal.SIGTERM
    assert names(tmp_path) == []
