"""Evaluations that are interrupted, shared between ranks, of several models, and on any pair of folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError
from mvat_dist.evaluate import main
from mvat_dist.evaluation import validate
from mvat_dist.io import only_writer, write_json
from mvat_dist.models import weights
from mvat_dist.models.manner import build
from mvat_dist.runs.folder import RunDir
from tests.conftest import REPOSITORY
from tests.mistakes import assert_refused
from tests.signals import noise_at, syllables
from tests.tiny_corpus import write_pairs
from tests.waiting import until

TINY = Size("small", 8, depth=2)
SCORES = ["rows.jsonl", "scores.csv"]
"""What equal evaluations share byte for byte; the other files hold measured times too."""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(file: Path, seed: int, name: str = "tiny", step: int = 1) -> Path:
    torch.manual_seed(seed)
    weights.save(file, build(TINY).state_dict(), name=name, size=TINY, step=step)
    return file


def pairs(count: int, seconds: float = 1.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Noisy and clean by key; SNRs 0, 2, 4 ... dB."""
    cleans = [syllables(seconds, seed=number) for number in range(count)]
    return {f"utt_{n}": (clean + noise_at(clean, 2.0 * n), clean) for n, clean in enumerate(cleans)}


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_pairs(tmp_path / "shards", "test_a", pairs(8))
    return tmp_path / "shards"


@pytest.fixture
def model(tmp_path) -> Path:
    return save(tmp_path / "one.safetensors", 0)


def content(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in SCORES]


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_a_killed_evaluation_goes_on_and_ends_as_an_undisturbed_one(model, corpus, tmp_path):
    argv = [str(model), "--data", str(corpus), "--metrics", "si_sdr,estoi", "--processes", "1", "--out"]
    main([*argv, str(tmp_path / "whole")])

    out = tmp_path / "killed one"
    command = [sys.executable, "-m", "mvat_dist.evaluate", *argv, str(out)]
    started = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(parts(out)) > 2, 120, "no rows were written")
    finally:
        started.kill()
        started.wait()
    (part,) = out.glob("rows-*/00000.jsonl")
    kept = parts(out)
    assert 2 < len(kept) < 16
    part.write_bytes(part.read_bytes() + b'{"subset": "test_a", "ind')  # a line that the kill cut short

    main([*argv, str(out)])
    assert content(out) == content(tmp_path / "whole")
    assert not list(out.glob("rows-*"))


def parts(out: Path) -> list[bytes]:
    """Lines of all parts of a running evaluation."""
    return [
        line for path in out.glob("rows-*/*.jsonl") for line in path.read_bytes().splitlines(keepends=True)
    ]


def test_a_finished_evaluation_is_not_done_again(model, corpus, tmp_path, capsys):
    argv = [str(model), "--data", str(corpus), "--metrics", "si_sdr", "--out", str(tmp_path / "out")]
    main(argv)
    first = capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    main(argv)
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.parametrize(
    ("change", "named"), [("weights", "networks"), ("metrics", "metrics"), ("clips", "clips")]
)
def test_rows_of_other_weights_metrics_or_clips_are_not_taken(model, corpus, tmp_path, capsys, change, named):
    out = tmp_path / "out"
    argv = {"--data": str(corpus), "--metrics": "si_sdr", "--out": str(out)}
    main([str(model), *(part for option in argv.items() for part in option)])
    before = {(row["index"], row["model"]): row["si_sdr"] for row in rows_of(out)}
    if change == "weights":
        save(model, 1)
    if change == "metrics":
        argv["--metrics"] = "si_sdr,segsnr"
    if change == "clips":
        argv["--max-seconds"] = "0.75"
    main([str(model), *(part for option in argv.items() for part in option)])
    assert f"scores of another evaluation (other {named})" in capsys.readouterr().err
    after = {(row["index"], row["model"]): row["si_sdr"] for row in rows_of(out)}
    same = {key for key, value in after.items() if before[key] == value}
    assert same == {
        "weights": {key for key in after if key[1] == "noisy"}, "metrics": set(after), "clips": set()
    }[change]  # fmt: skip
    assert json.loads((out / "scores.json").read_text())["metrics"].keys() == set(
        argv["--metrics"].split(",")
    )


@pytest.mark.parametrize("lost", ["rows.jsonl", "scores.csv", "scores.md"])
def test_a_finished_evaluation_that_has_lost_a_file_is_not_believed(model, corpus, tmp_path, lost):
    argv = [str(model), "--data", str(corpus), "--metrics", "si_sdr", "--out", str(tmp_path / "out")]
    main(argv)
    before = content(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    main(argv)
    assert (tmp_path / "out" / lost).is_file()
    assert content(tmp_path / "out") == before


def test_rows_of_aborted_evaluations_go_when_tables_are_written_but_not_those_under_way(corpus, tmp_path):
    out = tmp_path / "out"
    aborted, under_way, own = (
        out / name for name in ("rows-" + "a" * 16, "rows-" + "b" * 16, "rows-of-mine")
    )
    for folder in (aborted, under_way, own):
        folder.mkdir(parents=True)
        (folder / "00000.jsonl").write_text("")
    with only_writer(under_way / "00000.jsonl", "scoring"):
        main(["--data", str(corpus), "--metrics", "si_sdr", "--out", str(out)])
    assert not aborted.exists()
    assert under_way.is_dir()
    assert own.is_dir()


def test_networks_are_compared_with_the_noisy_input(corpus, tmp_path, capsys):
    models = [str(save(tmp_path / f"{name}.safetensors", seed)) for seed, name in enumerate("ab")]
    named = [f"{name}={path}" for name, path in zip("ab", models, strict=True)]
    out = tmp_path / "out"
    main([*named, "--data", str(corpus), "--metrics", "si_sdr", "--against", "noisy", "--out", str(out)])
    section = json.loads((out / "scores.json").read_text())["sections"]["test_a"]
    scores = {
        name: np.array([row["si_sdr"] for row in rows_of(out) if row["model"] == name])
        for name in ("noisy", "a", "b")
    }
    assert section["reference"] == "noisy"
    assert list(section["differences"]) == ["a", "b"]
    for name in "ab":
        found = section["differences"][name]["si_sdr"]
        assert found["mean"] == pytest.approx((scores[name] - scores["noisy"]).mean())
        assert found["low"] < found["mean"] < found["high"]
    assert "Differences from noisy:" in capsys.readouterr().out


def be_rank(monkeypatch, rank: int, world_size: int) -> None:
    """What torchrun tells a process."""
    told = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_share_the_clips_and_the_last_one_writes_the_tables(
    model, corpus, tmp_path, monkeypatch, capsys
):
    argv = [str(model), "--data", str(corpus), "--metrics", "si_sdr", "--processes", "1", "--out"]
    main([*argv, str(tmp_path / "alone")])
    capsys.readouterr()
    out = tmp_path / "shared"
    be_rank(monkeypatch, 2, 3)
    main([*argv, str(out)])
    assert "rank 2 of 3 is done; 12 rows of the others are missing" in capsys.readouterr().out
    assert not (out / "scores.json").exists()
    be_rank(monkeypatch, 0, 3)
    main([*argv, str(out)])
    assert {json.loads(line)["index"] for line in parts(out)} == {0, 2, 3, 5, 6}
    be_rank(monkeypatch, 0, 1)  # the third never came: another number of ranks goes on
    main([*argv, str(out)])
    assert "rows and tables" in capsys.readouterr().out
    assert content(out) == content(tmp_path / "alone")


def test_several_models_are_named_apart_and_compared(corpus, tmp_path, monkeypatch):
    first, second = (save(tmp_path / place / "net.safetensors", seed) for seed, place in enumerate("ab"))
    base = ["--data", str(corpus), "--metrics", "si_sdr"]
    main([str(first), str(second), *base, "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(record["networks"]) == ["a", "b"]
    section = record["sections"]["test_a"]
    rows = rows_of(tmp_path / "out")
    scores = {name: [row["si_sdr"] for row in rows if row["model"] == name] for name in "ab"}
    difference = section["differences"]["b"]["si_sdr"]
    assert section["reference"] == "a"
    assert difference["mean"] == pytest.approx(np.mean(scores["b"]) - np.mean(scores["a"]))
    assert difference["clips"] == 8

    named = [f"mine={first}", f"yours={second}", *base, "--out", str(tmp_path / "named")]
    main(named)
    # Another comparison of the same rows scores nothing.
    monkeypatch.setattr(validate, "score_as_completed", None)
    main([*named, "--against", "yours"])
    record = json.loads((tmp_path / "named" / "scores.json").read_text())
    assert list(record["networks"]) == ["mine", "yours"]
    assert list(record["sections"]["test_a"]["differences"]) == ["mine"]


def test_the_teacher_of_two_runs_is_scored_once(corpus, tmp_path):
    teacher = save(tmp_path / "teacher.safetensors", 9, "big")
    for seed, name in enumerate(("one", "two")):
        a_run(tmp_path / name, seed, teacher)
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    main(
        [*runs, "--data", str(corpus), "--limit", "1", "--metrics", "si_sdr", "--out", str(tmp_path / "out")]
    )
    assert [row["model"] for row in rows_of(tmp_path / "out")] == ["noisy", "teacher", "one/tiny", "two/tiny"]


def a_run(path: Path, seed: int, teacher: Path) -> RunDir:
    """A run with a student and the record of its teacher."""
    run = RunDir(path)
    save(run.weights("tiny", "best"), seed)
    sha256 = weights.fingerprint(weights.load(teacher).model)
    write_json(run.inputs, {"teacher": {"file": str(teacher), "sha256": sha256}})
    run.config.write_text("student: tiny\n")
    return run


@pytest.fixture
def taught(tmp_path) -> RunDir:
    return a_run(tmp_path / "taught", 1, save(tmp_path / "teacher.safetensors", 9, "big"))


def models_of(out: Path) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows_of(out)))


def test_a_teacher_that_has_learnt_since_is_not_called_the_teacher(taught, corpus, tmp_path, capsys):
    asked = [str(taught.path), "--data", str(corpus), "--limit", "1", "--metrics", "si_sdr"]
    main([*asked, "--out", str(tmp_path / "before")])
    save(tmp_path / "teacher.safetensors", 10, "big")
    main([*asked, "--out", str(tmp_path / "after")])
    assert models_of(tmp_path / "before") == ["noisy", "teacher", "tiny"]
    assert models_of(tmp_path / "after") == ["noisy", "tiny"]
    assert f"no longer holds the weights that taught {taught.path}" in capsys.readouterr().err


@pytest.mark.parametrize("record", ['{"teacher"', "{}", '{"teacher": {"file": "a"}}', '{"teacher": 3}'])
def test_a_damaged_record_of_a_teacher_is_named(taught, corpus, capsys, record):
    taught.inputs.write_text(record)
    asked = [str(taught.path), "--data", str(corpus)]
    assert_refused(main, asked, f"{taught.inputs} is damaged", capsys)


@pytest.mark.parametrize("name", ["tiny", "teacher"])
def test_a_chosen_name_is_not_one_of_a_run(taught, corpus, tmp_path, capsys, name):
    asked = [str(taught.path), f"{name}={tmp_path / 'teacher.safetensors'}", "--data", str(corpus)]
    assert_refused(main, asked, f"{name} is a network of {taught.path}: choose another NAME", capsys)


def test_where_scores_go_that_nobody_placed(corpus, tmp_path, monkeypatch):
    """Each thing that is scored has a place of its own, and so has a part of the clips."""
    monkeypatch.chdir(tmp_path)
    base = ["--data", str(corpus), "--metrics", "si_sdr"]
    for name in ("one", "two"):
        main([str(save(tmp_path / "lr=0.1" / f"{name}.safetensors", 1)), *base, "--limit", "1"])
    main([str(tmp_path / "lr=0.1" / "one.safetensors"), *base, "--max-seconds", "0.5"])
    assert sorted(path.name for path in (tmp_path / "lr=0.1" / "evaluate").iterdir()) == [
        "one-shards-0.5s-best",
        "one-shards-first1-best",
        "two-shards-first1-best",
    ]
    assert not (tmp_path / "evaluate").exists()


def folders(tmp_path: Path) -> list[str]:
    """Two folders: pairs of several rates, channels and formats, one without a twin, two that are none."""
    for side in ("noisy", "clean/deeper"):
        (tmp_path / side).mkdir(parents=True)
    (tmp_path / "noisy" / "deeper").mkdir()
    found = pairs(6)
    for number, (rate, channels, suffix) in enumerate(
        [(16000, 1, "wav"), (48000, 2, "flac"), (8000, 1, "ogg"), (16000, 1, "wav"), (16000, 1, "wav")]
    ):
        for side, audio in zip(("noisy", "clean"), found[f"utt_{number}"], strict=True):
            audio = np.interp(np.arange(0, audio.size, 16000 / rate), np.arange(audio.size), audio)
            audio = audio[: audio.size - (rate // 4 if number == 3 and side == "clean" else 0)]
            name = f"{side}_of_book_fileid_{number}.{suffix}"
            soundfile.write(tmp_path / side / "deeper" / name, np.tile(audio[:, None], channels), rate)
    (tmp_path / "noisy" / "deeper" / "noisy_of_book_fileid_4.wav").write_bytes(b"RIFF, but not really")
    soundfile.write(tmp_path / "noisy" / "lonely.wav", found["utt_5"][0], 16000)
    return ["--noisy", str(tmp_path / "noisy"), "--clean", str(tmp_path / "clean")]


def test_any_pair_of_folders_with_what_cannot_be_scored_recorded(model, tmp_path, capsys):
    argv = [*folders(tmp_path), "--metrics", "si_sdr,segsnr", "--out", str(tmp_path / "out")]
    main([str(model), *argv])
    assert "1 files without a counterpart are left out" in capsys.readouterr().err
    rows = [row for row in rows_of(tmp_path / "out") if row["model"] == "noisy"]
    assert [row["key"] for row in rows] == [
        f"deeper/noisy_of_book_fileid_{n}.{suffix}"
        for n, suffix in enumerate(["wav", "flac", "ogg", "wav", "wav"])
    ]
    assert [row["duration_s"] for row in rows] == [1.0, 1.0, 1.0, None, None]
    assert rows[0]["snr_db"] == pytest.approx(0, abs=0.05)
    assert all(row["failure"] is None for row in rows[:3])
    assert rows[3]["failure"]["si_sdr"] == "halves of different length"
    assert rows[4]["failure"]["segsnr"] == "does not open as audio"
    assert "must be equally long" in rows[3]["problem"]
    assert rows[4]["problem"].startswith(f"{tmp_path}/noisy/deeper/noisy_of_book_fileid_4.wav does not open")
    assert rows[3]["si_sdr"] is None
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert record["unmatched"] == [str(tmp_path / "noisy" / "lonely.wav")]
    assert record["sections"][tmp_path.name]["scores"]["tiny"]["si_sdr"]["clips"] == 3


def test_without_a_model_the_noisy_input_alone_is_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*folders(tmp_path), "--metrics", "si_sdr", "--limit", "1"])
    assert [row["model"] for row in rows_of(Path(f"evaluate/{tmp_path.name}-first1-best"))] == ["noisy"]


@pytest.mark.parametrize(
    ("layout", "sets"),
    [
        (["test_set/{}/{side}", "no_reverb", "with_reverb"], ["test_no_reverb", "test_with_reverb"]),
        (["{}/{side}", "no_reverb", "with_reverb"], ["no_reverb", "with_reverb"]),
        (["{}/{side}_testset_wav/{side}_testset_wav", "DS_10283_2791"], ["test_valentini"]),
    ],
)
def test_corpora_as_they_come(tmp_path, monkeypatch, layout, sets):
    noisy, clean = pairs(1)["utt_0"]
    pattern, *places = layout
    for place in places:
        for side, audio in (("noisy", noisy), ("clean", clean)):
            folder = tmp_path / "corpus" / pattern.format(place, side=side)
            folder.mkdir(parents=True)
            soundfile.write(folder / "p232_001.wav", audio, 16000)
    monkeypatch.chdir(tmp_path)
    main(["--data", "corpus", "--metrics", "si_sdr"])
    assert [row["subset"] for row in rows_of(Path("evaluate/corpus-best"))] == sets


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either --data, or --noisy and --clean"),
        (["--noisy", "a"], "given together"),
        (["--noisy", "a", "--clean", "b", "--data", "c"], "give either"),
        (["--noisy", "none", "--clean", "a"], "--noisy none: no such folder"),
        (["--noisy", "a", "--clean", "b"], "no file in a (1 audio files) has its twin in b (0)"),
        (["--data", "a"], "nothing in a"),
        (
            ["--data", "shards", "--against", "one"],
            "--against one: no such network; there are none; or noisy",
        ),
        *(
            (["--data", "shards", "--max-seconds", no], "at least one sample")
            for no in ("nan", "inf", "1e-5")
        ),
        (
            ["x=one.safetensors", "x=two.safetensors", "--data", "shards"],
            "two things to score are called 'x'",
        ),
        (["noisy=one.safetensors", "--data", "shards"], "two things to score are called 'noisy'"),
        (["--data", "shards", "--dnsmos", "a/x.wav", "--metrics", "dnsmos"], "is no ONNX network"),
    ],
)
@pytest.mark.usefixtures("corpus")
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MVAT_DNSMOS", "")
    for name in ("a", "b"):
        Path(name).mkdir()
    soundfile.write("a/x.wav", np.ones(16000), 16000)
    save(Path("one.safetensors"), 0)
    save(Path("two.safetensors"), 1)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(main, argv, message, capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_evaluation_into_the_same_folder_is_refused_while_the_first_runs(corpus, tmp_path):
    argv = ["--data", str(corpus), "--metrics", "si_sdr", "--processes", "1", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "mvat_dist.evaluate", *argv]
    first = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        until(lambda: bool(list((tmp_path / "out").glob("rows-*/*.jsonl"))), 120)
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match="another process is scoring into"):
            main(argv)
    finally:
        first.kill()
        first.wait()
