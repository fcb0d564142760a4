"""A sweep without a server: W&B's contract, going on after a kill, and the ranking."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.numpy import load_file
from wandb.sdk.lib.config_util import dict_from_config_file

from mvat_dist import submit, sweep
from mvat_dist.errors import UserError
from mvat_dist.launch import sweep_file as sweepfile
from mvat_dist.launch import sweep_jobs, trials
from mvat_dist.launch.sweep_folder import SweepFolder
from mvat_dist.launch.trials import TrialRecord
from mvat_dist.runs.folder import RunDir
from tests.sweep_place import OBJECTIVE, STUDENTS, environment, sweep_file, write_place
from tests.waiting import until
from tests.wandb_server import serving
from tests.wandb_sweeps import SweepServer

# Writes its arguments, its parameters and the names of its variables.
PROGRAM = """\
import json, os, pathlib, sys
file = os.environ["WANDB_SWEEP_PARAM_PATH"]
names = [name for name in os.environ if name.startswith("WANDB_")]
received = {"argv": sys.argv[1:], "parameters": pathlib.Path(file).read_text(), "names": names}
pathlib.Path(os.environ["OUT"]).write_text(json.dumps(received))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return folder


def write_sweep(place: Path, parameters: Any, command: list[str], **more: Any) -> Path:
    file = place / "sweep.yaml"
    content = {
        "method": "grid",
        "metric": {"name": "valid/si_sdr", "goal": "maximize"},
        "program": "tell me.py",
    }
    text = yaml.safe_dump({**content, "parameters": parameters, "command": command, **more}, sort_keys=False)
    file.write_text(text)
    return file


def test_a_trial_hears_what_an_agent_would_tell_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "tell me.py").write_text(PROGRAM)
    point = {
        "optim.lr": 3e-05,
        "flag": True,
        "off": False,
        "group": {"b": [0.5, 1e-9]},
        "text": "a b",
        "none": None,
    }
    parameters = {name: {"value": value} for name, value in point.items()}
    parameters["group"] = {"parameters": {"b": {"value": [0.5, 1e-9]}}}
    macros = ["args", "args_no_hyphens", "args_no_boolean_flags", "args_json", "args_append_hydra"]
    command = [
        "${env}",
        "${interpreter}",
        "${program}",
        "--in=${envvar:PLACE}",
        *(f"${{{macro}}}" for macro in macros),
    ]
    file = write_sweep(place, parameters, command)
    received = {}
    monkeypatch.setenv("PLACE", "here")
    monkeypatch.setenv("OUT", str(place / "ours.json"))
    sweep.main([str(file)])
    received["ours"] = json.loads((place / "ours.json").read_text())
    with serving(SweepServer([point])) as server:
        server.config = yaml.safe_load(file.read_text())
        known = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "HOME": str(place)}
        known |= {"PLACE": "here", "OUT": str(place / "wandbs.json")}
        agent = [sys.executable, "-m", "wandb", "agent", "--count=1", "e/p/sw33p1d0"]
        subprocess.run(agent, env=environment(**known), check=True, capture_output=True, timeout=60)
    received["wandbs"] = json.loads((place / "wandbs.json").read_text())
    assert received["ours"]["argv"] == received["wandbs"]["argv"]
    assert "--in=here" in received["ours"]["argv"]
    for who in received:
        (place / who).write_text(received[who]["parameters"])
    assert dict_from_config_file(str(place / "ours")) == dict_from_config_file(str(place / "wandbs")) == point
    assert {"WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_MODE"} <= set(received["ours"]["names"])
    assert "WANDB_SWEEP_ID" not in received["ours"]["names"]


def test_a_killed_sweep_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Two points of the same science: the first is left alone, the second is killed and started again."""
    place = write_place(tmp_path)
    parameters = {
        "train.keep": {"values": [2, 3]},
        "train.steps": {"value": 24},
        "train.save_every": {"value": 3},
    }
    file = sweep_file(place, parameters, method="grid")
    command = [sys.executable, "-m", "mvat_dist.sweep", str(file)]
    folder = SweepFolder.of(sweepfile.read(file), 0, place / "runs")
    complete, killed = (RunDir(folder.path / folder.run_id(number)) for number in (0, 1))
    with (place / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=place, env=environment(), stdout=log, stderr=log)
        until(lambda: len(list(killed.checkpoints.glob("step-*"))) > 1, 240, (place / "log").read_text)
        others = psutil.Process(first.pid).children(recursive=True)
        for process in [first, *others]:
            process.kill()
        psutil.wait_procs(others, timeout=20)
        first.wait()
    assert killed.read_status()["state"] == "running"
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^trial \d+", done.stdout, re.MULTILINE) == ["trial 1"]
    assert killed.read_status()["starts"][-1]["step"] >= 3
    for student in STUDENTS:
        histories = [run.history(student).read_text().splitlines() for run in (complete, killed)]
        losses = [[row["loss"] for row in map(json.loads, lines) if "loss" in row] for lines in histories]
        assert len(losses[0]) == 24
        assert losses[0] == losses[1]
        weights = [load_file(run.weights(student, "last")) for run in (complete, killed)]
        assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    # The ranking has both, by the last score of the named student.
    score = [json.loads(line) for line in complete.history(OBJECTIVE).read_text().splitlines()][-1][
        "valid/si_sdr"
    ]
    assert len(re.findall(re.escape(f"{score:.4g}"), done.stdout)) == 2
    assert "24 | finished" in done.stdout


def finished(folder: SweepFolder, number: int, values: list[float | None]) -> None:
    """A trial with these scores at its validations."""
    run = RunDir(folder.path / f"trial {number}")
    run.student("a").mkdir(parents=True)
    rows = [{"step": 10 * at, "valid/si_sdr": value} for at, value in enumerate(values, start=1)]
    run.history("a").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 99, "loss": 1.0}]))
    run.write_status("finished", 99)
    TrialRecord(str(run.path), "a", [], {}, 0).write(folder.record_file(number))


@pytest.mark.parametrize(("goal", "order"), [("maximize", [2, 0, 1]), ("minimize", [1, 0, 2])])
def test_the_ranking_is_by_the_last_score(
    place: Path, capsys: pytest.CaptureFixture[str], goal: str, order: list[int]
) -> None:
    parameters = {"optim.lr": {"values": [1, 2, 3, 4, 5]}}
    file = write_sweep(place, parameters, ["true"], metric={"name": "valid/si_sdr", "goal": goal})
    folder = SweepFolder.of(sweepfile.read(file), 0, place / "runs")
    for number, values in enumerate([[9.0, 5.0], [1.0], [-3.0, 7.0], [None]]):
        finished(folder, number, values)
    sweep.main([str(file), "--ranking"])
    output = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()[2:-1]]
    assert [int(row[0]) for row in rows] == [*order, 3, 4]
    assert [row[1] for row in rows[3:]] == ["-", "-"]
    assert rows[-1][3:] == ["new", "optim.lr=5"]
    assert f"trial {order[0]}/students/a/best" in output


def test_points_that_are_not_chosen_yet_are_left_open(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(place, {"x": {"min": 0.0, "max": 1.0}}, ["true"], method="bayes", run_cap=2)
    sweep.main([str(file), "--ranking"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == [[str(number), "-", "-", "new", "-"] for number in (0, 1)]
    assert [path.name for path in place.iterdir()] == ["sweep.yaml"]


def test_trials_keep_the_points_with_which_they_began(place: Path) -> None:
    """Also where a later version would draw others."""
    file = write_sweep(place, {"x": {"min": 0.0, "max": 1.0}}, ["true"], method="random", run_cap=2)
    folder = SweepFolder.of(sweepfile.read(file), 0, place / "runs")
    trials.write_parameters(folder.parameters_file(0), {"x": 7.0})
    assert folder.choose(0) == folder.point(0) == {"x": 7.0}
    assert f"x={folder.sweep.point(1, 0)['x']:.4g}" in folder.ranking(2)
    assert "x=7 " in folder.ranking(2)


def test_optuna_hears_of_a_trial_that_failed_before_its_run_began(place: Path) -> None:
    import optuna

    file = write_sweep(
        place, {"x": {"min": 0.0, "max": 1.0}}, ["sh", "-c", "exit 7"], method="bayes", run_cap=2
    )
    with pytest.raises(SystemExit):
        sweep.main([str(file)])
    folder = SweepFolder.of(sweepfile.read(file), 0, place / "runs")
    journal = optuna.storages.journal.JournalFileBackend(str(folder.path / "optuna.jsonl"))
    storage = optuna.storages.JournalStorage(journal)
    study = optuna.load_study(study_name=folder.sweep.fingerprint, storage=storage)
    states = {trial.user_attrs["trial"]: trial.state.name for trial in study.trials}
    assert states == {0: "FAIL", 1: "RUNNING"}  # the second is told when a third is to start


def test_three_failures_in_a_row_end_it(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(place, {"x": {"values": [1, 2, 3, 4, 5]}}, ["sh", "-c", "echo one more; exit 7"])
    with pytest.raises(SystemExit) as end:
        sweep.main([str(file)])
    output = capfd.readouterr()
    assert end.value.code == 7
    assert output.out.count("one more") == 3
    assert "3 trials in a row have failed" in output.err


@pytest.mark.parametrize(
    "start",
    [["mvat_dist.sweep"], ["mvat_dist.submit", "--cluster=local", "--sweep"]],
    ids=["sweep", "submit"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_trial_and_ends_the_sweep(
    place: Path, start: list[str], number: signal.Signals
) -> None:
    """The trial gets the time that it needs, also where what has started the sweep is killed."""
    trial = 'trap "sleep 1; touch saved; exit 0" TERM; touch begun; while :; do sleep 0.1; done'
    file = write_sweep(place, {"x": {"values": [1, 2]}}, ["sh", "-c", trial])
    command = [sys.executable, "-m", *start, str(file)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    until((place / "begun").exists, 60)
    process.send_signal(number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    until((place / "saved").exists, 20)
    if number == signal.SIGTERM or "mvat_dist.submit" in start:
        assert "continues with trial 0" in output


def test_what_needs_a_server_is_named_in_one_line(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = {"method": "random", "early_terminate": {"type": "hyperband", "min_iter": 3}}
    file = write_sweep(place, {"x": {"min": 0.0, "max": 1.0}}, ["true"], **more)
    sweep.main([str(file), "--count=1"])
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "hyperband" in warnings[0]


# A trial that takes no time: its score is best at x = 0.7, and below 0.1 its loss diverges.
TRAINING = """\
import json, os, pathlib, sys
import yaml
from mvat_dist.launch.trials import TrialRecord
from mvat_dist.runs.folder import RunDir
x = yaml.safe_load(pathlib.Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text())["x"]["value"]
place = pathlib.Path.cwd()
if (place / "kill").exists() and len(list(place.glob("runs/sweep-*/trial-*.json"))) == 7:
    (place / "kill").unlink()
    os.kill(os.getppid(), 9)
diverged = x < 0.1
run = RunDir(place / "runs" / os.environ["WANDB_RUN_ID"])
run.student("a").mkdir(parents=True, exist_ok=True)
rows = [{"step": 10, "valid/si_sdr": -3.0}, {"step": 20, "valid/si_sdr": None if diverged else -abs(x - 0.7)}]
run.history("a").write_text("".join(json.dumps(row) + "\\n" for row in rows))
run.write_status("failed" if diverged else "finished", 20)
TrialRecord(str(run.path), "a", [], {}, int(diverged)).write(pathlib.Path(os.environ["MVAT_TRIAL_RECORD"]))
sys.exit(int(diverged))
"""


def test_a_bayesian_search_goes_on_after_a_kill_and_hears_of_failures(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The sweep's process is killed during its eighth trial; the points are those of one never killed."""
    import optuna

    (place / "tell me.py").write_text(TRAINING)
    parameters = {"x": {"min": 0.0, "max": 1.0}}
    file = write_sweep(place, parameters, ["${interpreter}", "${program}"], method="bayes")
    command = [sys.executable, "-m", "mvat_dist.sweep", str(file), "--count=16"]
    points = []
    for name, exit_codes in (("never", (1,)), ("killed", (-signal.SIGKILL, 1))):
        (place / name).mkdir()
        (place / name / "tell me.py").write_text(TRAINING)
        for code in exit_codes:
            if code < 0:
                (place / name / "kill").touch()
            at = place / name
            done = subprocess.run(command, cwd=at, env=environment(), capture_output=True, text=True)
            assert done.returncode == code, done.stderr
        folder = SweepFolder.of(sweepfile.read(file), 0, place / name / "runs")
        points.append([folder.point(number) for number in range(16)])
    assert None not in points[0]
    assert points[0] == points[1]
    journal = optuna.storages.journal.JournalFileBackend(str(folder.path / "optuna.jsonl"))
    storage = optuna.storages.JournalStorage(journal)
    study = optuna.load_study(study_name=folder.sweep.fingerprint, storage=storage)
    states = {trial.user_attrs["trial"]: trial.state.name for trial in study.trials[:-1]}
    assert states == {
        number: "FAIL" if point and point["x"] < 0.1 else "COMPLETE"
        for number, point in enumerate(points[0][:-1])
    }
    assert "FAIL" in states.values()
    assert re.search(r"^best: .*/a/best/model", done.stdout, re.MULTILINE)
    capfd.readouterr()
    submit.main([f"--sweep={file}", "--cluster=local", "--dry-run", "--count=16"])
    assert "trials   16, each with the point that Optuna proposes" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count=0"], "--count 0: give at least 1"),
        (["--seed=-1"], "--seed -1"),
        (["--optim.lr=1"], "unknown option --optim.lr.*belong into the command of"),
        (["--cluster=cloud"], "invalid choice"),
        ([], "no end: give --count"),
    ],
)
def test_mistakes_leave_nothing(place: Path, arguments: list[str], words: str) -> None:
    file = write_sweep(place, {"x": {"min": 0.0, "max": 1.0}}, ["true"], method="random")
    with pytest.raises(UserError, match=words):
        sweep.main([str(file), *arguments])
    assert [path.name for path in place.iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("target", "more", "words"),
    [
        ("configs/none.yaml", [], "'configs/none.yaml' is no sweep: give ENTITY/PROJECT/ID"),
        ("e/p", [], "'e/p' is no sweep"),
        ("", [], "'' is no sweep"),
        ("e/p/s", ["--optim.lr=1"], "unknown option --optim.lr"),
    ],
)
def test_no_job_waits_for_a_sweep_that_is_none(
    capsys: pytest.CaptureFixture[str], target: str, more: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        submit.main([f"--sweep={target}", "--cluster=local", *more])
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"sbatch slurm/sweep_agent\.sh"):
        sweep_jobs.main([target, *more])


@pytest.mark.parametrize(
    "target", ["e/p/s-1", "https://wandb.ai/e/p/sweeps/s-1", "http://h:8/e/p/sweeps/s-1/?nw=a"]
)
def test_a_dry_run_names_the_agent_and_the_trials(capsys: pytest.CaptureFixture[str], target: str) -> None:
    submit.main([f"--sweep={target}", "--cluster=local", "--dry-run", "--nodes=2", "--count=3"])
    output = capsys.readouterr().out
    assert "start    python -m wandb agent --count=3 e/p/s-1\n" in output
    assert "trials   3\n" in output


def test_a_dry_run_of_a_file_lists_its_points(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(place, {"x": {"values": [7, 8]}}, ["touch", "begun"])
    submit.main([f"--sweep={file}", "--cluster=local", "--dry-run"])
    assert capsys.readouterr().out.endswith("trials   2\n         0: x=7\n         1: x=8\n")
    assert not (place / "begun").exists()


def test_a_point_beyond_the_grid_is_not_trained(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake, but for the tasks of an array that is longer than the grid."""
    file = write_sweep(place, {"x": {"values": [1, 2]}}, ["touch", "begun"])
    with pytest.raises(UserError, match="--point 2: the grid has 2 points: 0 to 1"):
        sweep.main([str(file), "--point=2"])
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    sweep.main([str(file), "--point=2"])
    assert "nothing to do for task 2: the grid has 2 points" in capsys.readouterr().out
    assert not (place / "begun").exists()


@pytest.mark.parametrize(
    ("parameter", "option", "metric", "words"),
    [
        ("optim.lrr", "", "valid/si_sdr", "did you mean 'optim.lr'"),
        ("optim.lr", "--distil.method=mvat", "valid/si_sdr", "teacher"),
        ("optim.lr", "--train.batch=3", "valid/si_sdr", "--train.batch 3 cannot be shared by 2"),
        (
            "optim.lr",
            "",
            "valid/pesq",
            "valid/pesq is no score of a validation; did you mean 'valid/pesq_wb'",
        ),
    ],
)
def test_a_mistake_of_every_trial_is_told_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameter: str, option: str, metric: str, words: str
) -> None:
    place = write_place(tmp_path)
    monkeypatch.chdir(place)
    monkeypatch.setenv(trials.PROCESSES, "1")  # restored afterwards
    file = sweep_file(place, {parameter: {"values": [0.1, 0.2]}}, method="grid")
    content = yaml.safe_load(file.read_text())
    content["command"].insert(-1, option or "--train.steps=1")
    file.write_text(yaml.safe_dump({**content, "metric": {"name": metric, "goal": "maximize"}}))
    for command in (
        lambda: sweep.main([str(file), "--processes=2"]),
        lambda: submit.main([f"--sweep={file}", "--cluster=local", "--nodes=2"]),
    ):
        with pytest.raises(UserError, match=words):
            command()
    assert not (place / "runs").exists()


def test_a_trial_without_a_run_has_failed_and_no_metric_is_doubted(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(place, {"x": {"values": [1, 2]}}, ["sh", "-c", "exit 7"])
    with pytest.raises(SystemExit):
        sweep.main([str(file), "--count=1"])
    sweep.main([str(file), "--ranking"])
    output = capfd.readouterr()
    assert "has logged" not in output.err
    assert re.findall(r"(failed|new) +\| x=(\d)", output.out)[-2:] == [("failed", "1"), ("new", "2")]
