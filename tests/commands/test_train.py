"""The trainer as a user starts it: real processes, real engines, real shards.

Laws: a resumed run equals the uninterrupted one bit for bit; a student learns the same alone and in a
group; every ZeRO stage gives the same curve; one process equals two on the same global batch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mvat_dist.runs.folder import RunDir
from tests.tiny_corpus import write_pairs, write_sources
from tests.waiting import until

RATE = 16_000
SIZES = (
    "{tiny: {kind: small, hidden: 4, depth: 2}, mini: {kind: base, hidden: 6, depth: 2}, "
    "shallow: {kind: small, hidden: 4, depth: 3}}"
)
COMMON = (
    f"--sizes={SIZES}",
    "--data.reverb_probability=0",
    "--data.tempo_probability=0.5",
    "--data.segment_seconds=0.25",
    "--data.workers=0",
    "--train.batch=4",
    "--train.micro_batch=1",
    "--train.steps=6",
    "--train.save_every=2",
    "--train.validate_every=4",
    "--valid.clips=2",
    "--valid.best=si_sdr",
    "--track.every=1",
    "--track.examples=0",
)
LOSSES_ONLY = ("--train.steps=4", "--train.save_every=4", "--train.validate_every=4", "--valid.clips=1")
TIMING = ("audio_seconds_per_second", "joules", "time", "memory")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Harmonic "speech" and white noise, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("tiny corpus")
    generator = np.random.default_rng(0)

    def voice(seconds: float) -> np.ndarray:
        time = np.arange(int(seconds * RATE)) / RATE
        pitch, beat = generator.uniform(100, 300), generator.uniform(1, 3)
        harmonics = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 6))
        return 0.2 * (0.2 + np.clip(np.sin(2 * np.pi * beat * time), 0, 1)) * harmonics

    write_sources(folder, "train_clean", {f"c{i}": voice(1.0) for i in range(10)}, shards=4)
    noise = {f"n{i}": 0.1 * generator.standard_normal(2 * RATE) for i in range(4)}
    write_sources(folder, "train_noise", noise, shards=4)
    clean = {f"v{i}": voice(1.5) for i in range(2)}
    noisy = {key: signal + 0.03 * generator.standard_normal(signal.size) for key, signal in clean.items()}
    write_pairs(folder, "valid", {key: (noisy[key], clean[key]) for key in clean})
    return folder


def command(corpus: Path, runs: Path, name: str, arguments: Sequence[str], processes: int = 1) -> list[str]:
    local = ["mvat_dist.submit", "--cluster=local", f"--nodes={processes}"]
    module = local if processes > 1 else ["mvat_dist.train"]
    given = [f"--data.train={corpus}", f"--runs={runs}", f"--name={name}", *COMMON, *arguments]
    return [sys.executable, "-m", *module, *given]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def succeed(argv: list[str]) -> None:
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def train(corpus: Path, runs: Path, name: str, *arguments: str, processes: int = 1) -> Path:
    succeed(command(corpus, runs, name, arguments, processes))
    return runs / name


def history(run: Path, student: str) -> list[dict[str, Any]]:
    lines = (run / "students" / student / "history.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def losses(run: Path, student: str) -> np.ndarray:
    return np.array([row["loss"] for row in history(run, student) if "loss" in row])


def weights(run: Path, student: str, which: str = "last") -> dict[str, np.ndarray]:
    return dict(load_file(run / "students" / student / which / "model.safetensors"))


def same_weights(one: Path, other: Path, student: str, which: str = "last") -> bool:
    """Whether the last weights of one run are those of the other."""
    first, second = weights(one, student), weights(other, student, which)
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("my runs")


@pytest.fixture(scope="module")
def teacher(corpus: Path, runs: Path) -> Path:
    return train(corpus, runs, "teacher", "--student=mini", "--distil.method=none")


@pytest.fixture(scope="module")
def group(corpus: Path, runs: Path, teacher: Path) -> Path:
    """Two students beside the teacher, undisturbed, with every loss on."""
    return train(
        corpus, runs, "group", "--student=tiny,mini", f"--teacher={teacher}", "--distil.method=mvat+output"
    )


def test_a_run_explains_itself(group: Path, teacher: Path) -> None:
    status = json.loads((group / "STATUS").read_text())
    assert (status["state"], status["step"]) == ("finished", 6)
    inputs = json.loads((group / "inputs.json").read_text())
    assert inputs["teacher"]["file"].startswith(str(teacher))
    assert all(len(digest) == 64 for digest in inputs["data"].values())
    assert sorted(path.name for path in (group / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]
    rows = history(group, "mini")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "valid/stoi" in row] == [4, 6]
    row = rows[0]
    terms = [value for key, value in row.items() if key.startswith("mvat/")]
    assert len(terms) == 12  # 2 sides, 2 levels, 3 views
    assert row["mvat"] == pytest.approx(sum(terms), rel=1e-5)
    assert row["loss"] == pytest.approx(row["enhance"] + row["output"] + row["mvat"], rel=1e-5)


def test_a_student_learns_the_same_alone(corpus: Path, runs: Path, teacher: Path, group: Path) -> None:
    alone = train(
        corpus, runs, "alone", "--student=tiny", f"--teacher={teacher}", "--distil.method=mvat+output"
    )
    assert history(alone, "tiny") == history(group, "tiny")
    assert same_weights(alone, group, "tiny")


def stopped_early(argv: list[str]) -> int:
    """Exit code of a run that gets SIGTERM when its STATUS first says `running`."""
    runs, name = (
        next(a for a in argv if a.startswith(key)).removeprefix(key) for key in ("--runs=", "--name=")
    )
    status = Path(runs) / name / "STATUS"
    status.unlink(missing_ok=True)
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.DEVNULL) as process:
        until(lambda: process.poll() is not None or status.exists(), 120, pause=0.01)
        process.send_signal(signal.SIGTERM)
    return process.returncode


def test_a_stopped_run_goes_on_bit_for_bit(corpus: Path, runs: Path, teacher: Path, group: Path) -> None:
    """With a reader process, where the undisturbed run has none: what it had read ahead is not lost."""
    arguments = (
        "--student=tiny,mini",
        f"--teacher={teacher}",
        "--distil.method=mvat+output",
        "--data.workers=1",
    )
    resumed, stops = runs / "stopped", 0
    for _ in range(10):  # each start is asked to stop as soon as it listens, and makes one step
        code = stopped_early(command(corpus, runs, "stopped", arguments))
        if code == 0:
            break
        assert code == 128 + signal.SIGTERM
        assert json.loads((resumed / "STATUS").read_text())["state"] == "stopped"
        stops += 1
        if stops == 2:
            train(corpus, runs, "stopped", *arguments)
            break
    assert stops == 2
    assert json.loads((resumed / "STATUS").read_text())["state"] == "finished"
    for student in ("tiny", "mini"):
        assert history(resumed, student) == history(group, student)
        assert same_weights(resumed, group, student)


def test_a_finished_run_is_not_trained_again(corpus: Path, runs: Path, teacher: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in teacher.rglob("*.safetensors")}
    again = train(corpus, runs, "teacher", "--student=mini", "--distil.method=none")
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*.safetensors")} == before


@pytest.fixture(scope="module")
def two_processes(corpus: Path, runs: Path, teacher: Path) -> dict[int, np.ndarray]:
    """Loss curves of two ranks by ZeRO stage."""
    found = {}
    for stage in (0, 1, 2, 3):
        run = train(
            corpus,
            runs,
            f"stage-{stage}",
            "--student=tiny",
            f"--teacher={teacher}",
            f"--engine.zero_stage={stage}",
            *LOSSES_ONLY,
            processes=2,
        )
        found[stage] = losses(run, "tiny")
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_give_the_same_curve(two_processes: dict[int, np.ndarray], stage: int) -> None:
    assert len(two_processes[0]) == 4
    np.testing.assert_allclose(two_processes[stage], two_processes[0], rtol=1e-5)


def test_one_process_equals_two(corpus: Path, runs: Path, teacher: Path) -> None:
    """With frozen statistics; otherwise BatchNorm sees other micro-batches, by its nature."""
    arguments = ("--student=tiny", f"--teacher={teacher}", "--engine.freeze_batchnorm=true", *LOSSES_ONLY)
    one = train(corpus, runs, "one", *arguments)
    two = train(corpus, runs, "two", *arguments, processes=2)
    np.testing.assert_allclose(losses(two, "tiny"), losses(one, "tiny"), rtol=1e-5)


def test_students_begin_as_the_weights_they_are_given(corpus: Path, runs: Path, group: Path) -> None:
    """At no learning rate they stay what they began as, and their first score is the best."""
    arguments = ("--optim.lr=1e-30", "--engine.freeze_batchnorm=true", "--distil.method=none", *LOSSES_ONLY)
    still = train(corpus, runs, "still", "--student=tiny,mini", f"--train.init={group}", *arguments)
    for student in ("tiny", "mini"):
        assert same_weights(still, group, student, "best")
        assert [row["step"] for row in history(still, student) if "valid/si_sdr" in row] == [0, 4]
    began = json.loads((still / "inputs.json").read_text())["init"]
    assert {name: one["name"] for name, one in began.items()} == {"tiny": "tiny", "mini": "mini"}


def test_what_students_began_with_is_not_needed_again(corpus: Path, runs: Path, teacher: Path) -> None:
    """Stopped in the middle, without the file that it began with, a run ends as one that was left alone."""
    given = runs / "given.safetensors"
    shutil.copy(teacher / "students" / "mini" / "last" / "model.safetensors", given)
    arguments = ["--student=mini", "--distil.method=none", f"--train.init={given}"]
    whole = train(corpus, runs, "given-whole", *arguments)
    assert stopped_early(command(corpus, runs, "given-stopped", arguments)) == 128 + signal.SIGTERM
    before = json.loads((runs / "given-stopped" / "inputs.json").read_text())
    given.unlink()
    succeed(command(corpus, runs, "given-stopped", arguments))
    assert same_weights(runs / "given-stopped", whole, "mini")
    assert json.loads((runs / "given-stopped" / "inputs.json").read_text()) == before
    assert before["init"]["mini"]["name"] == "mini"


def test_a_start_that_fails_after_it_began_says_so(corpus: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(corpus, tmp_path, "run", ["--student=tiny", "--distil.method=none"]),
        env=environment() | {"WANDB_MODE": "sometimes"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    status = RunDir(tmp_path / "run").read_status()
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "WANDB_MODE" in status["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--student=manner-s-5gf", "--distil.method=none"], "did you mean 'manner-s-5.3gf'"),
        (["--student=tiny", "--teacher=no/such/run"], "no/such/run"),
        (["--student=tiny", "--teacher={corpus}/manifest.json"], "manifest.json"),
        (["--student=tiny", "--distil.method=none", "--data.train=no/such/shards"], "no/such/shards"),
        (["--student=tiny", "--distil.method=none", "--resume=must"], "no complete checkpoint"),
        (["--student=shallow", "--teacher={teacher}", "--distil.method=mvat"], "no multi-view block"),
        (["--student=tiny", "--distil.method=none", "--train.init={teacher}"], "but the student tiny is"),
        (["--student=tiny", "--distil.method=none", "--data.workers=9"], "shards"),
        (["--student=tiny", "--distil.method=none", "--engine.device=cuda"], "GPU"),
    ],
)
def test_mistakes_cost_one_line(
    corpus: Path, teacher: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    places = {"{corpus}": str(corpus), "{teacher}": str(teacher)}
    given = arguments
    for place, path in places.items():
        given = [argument.replace(place, path) for argument in given]
    done = subprocess.run(
        command(corpus, tmp_path / "runs", "wrong", given),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert words in lines[0]
    assert not (tmp_path / "runs").exists()
