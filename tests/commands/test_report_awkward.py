"""Reports on what is incomplete, damaged, double or of several kinds."""

from __future__ import annotations

import html
import json
import os
import re
from typing import Any

import pytest

from mvat_dist.config import sizes as students
from mvat_dist.errors import UserError
from mvat_dist.io import read_json, write_json
from mvat_dist.models import weights as modelfile
from mvat_dist.models.manner import build
from mvat_dist.report import main
from mvat_dist.runs.folder import RunDir
from tests.report_page import make, numbers
from tests.report_runs import config_of, make_run, write_evaluation

STUDENTS = ("manner-s-0.6gf", "manner-s-2.0gf")


def test_what_is_not_there_is_said_in_its_place(tmp_path):
    run = RunDir(tmp_path / "runs" / "young")
    run.create(config_of("mvat", 3))
    page = make(tmp_path / "runs", tmp_path / "out")
    for line in (
        "no run was evaluated",
        "no run has a record yet",
        "no run kept examples",
        "no: none was trained alone under the same settings",
    ):
        assert line in page.text
    make_run(tmp_path / "runs" / "young", config_of("mvat", 3))
    page = make(tmp_path / "runs", tmp_path / "out")
    assert "No ablation of the views" in page.text
    assert "cannot be said: no student was trained alone under the same settings" in page.text
    make_run(tmp_path / "runs" / "longer", config_of("none", 3, "--train.steps", "80"))
    page = make(tmp_path / "runs", tmp_path / "out")
    assert "the nearest differs in train.steps" in page.text
    assert "|" not in page.table("PESQ-WB (MOS) ↑, higher is better: mean")[STUDENTS[0], "mvat"]


def test_damage_is_named_and_the_rest_counts(tmp_path, capsys):
    runs = tmp_path / "runs"
    for name, seed in (("whole", 0), ("torn", 1), ("broken", 2)):
        make_run(runs / name, config_of("none", seed))
    rows = runs / "torn" / "evaluate" / "dns-best" / "rows.jsonl"
    lines = rows.read_text().splitlines()
    lines[2] = '{"subset": "test_a", "key'
    lines[5] = "[1, 2]"
    rows.write_text("\n".join(lines))
    with (runs / "torn" / "students" / STUDENTS[0] / "history.jsonl").open("a") as file:
        file.write('{"step": 50, "enh')
    (runs / "torn" / "STATUS").write_text("{")
    (runs / "torn" / "students" / STUDENTS[0] / "examples" / "00.flac").write_bytes(b"fLaC not really")
    (runs / "whole" / "evaluate" / "more-best").mkdir()
    (runs / "whole" / "evaluate" / "more-best" / "scores.json").write_text("[]")
    (runs / "broken" / "config.yaml").write_text("student: [nobody\n")
    (runs / "notes").mkdir()
    (runs / "whole" / "students" / STUDENTS[1] / "examples" / "00.flac").write_bytes(b"")
    page = make(runs, tmp_path / "out")
    told = capsys.readouterr().err
    for words in (
        "rows.jsonl: 2 damaged lines are left out (line 3, 6)",
        "history.jsonl: 1 damaged lines",
        "STATUS is damaged",
        "more-best/scores.json is damaged",
        "broken is left out: its config.yaml cannot be used",
        "notes is left out: it is no run folder",
        "examples/00.flac cannot be played",
    ):
        assert words in page.text
        assert words in told
    assert "2 runs" in page.text
    assert numbers(page.table("PESQ-WB (MOS) ↑, higher is better: mean")[STUDENTS[0], "none"])


def test_a_clip_without_a_score_is_left_out_of_both_sides(tmp_path):
    runs = tmp_path / "runs"
    for method in ("none", "mvat"):
        config = config_of(method, 0)
        run = make_run(runs / method, config)
        rows = rows_of(run)
        for row in rows:
            row["pesq_wb"] = {"none": 1.0, "mvat": 2.0}[method] + row["index"]
            if method == "mvat" and row["index"] >= 30:
                row["pesq_wb"], row["failure"] = None, {"pesq_wb": "silent estimate"}
        write_evaluation(run, config, rows)
    page = make(runs, tmp_path / "out")
    table = page.table("PESQ-WB (MOS) ↑, higher is better: mean")
    # Alone: 1 to 40, 20.5 on average. Taught: 2 to 31, 16.5; exactly 1 better wherever both have a score.
    assert numbers(table[STUDENTS[0], "none"])[0] == 20.5
    mean, *_, difference, low, high = numbers(table[STUDENTS[0], "mvat"])
    assert (mean, difference, low, high) == (16.5, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("failed", "left"), [(range(40), "-"), (range(10, 40), "1.45")])
def test_a_seed_whose_clips_failed_is_not_passed_over(tmp_path, failed, left):
    """Nor does a mean of the clips that are left stand there as if it were of all, or win the plot."""
    runs = tmp_path / "runs"
    for seed in (0, 1):
        config = config_of("none", seed)
        run = make_run(runs / str(seed), config)
        rows = rows_of(run)
        for row in rows:
            row["pesq_wb"] = 1.0 + row["index"] / 10
            if row["model"] == STUDENTS[0] and seed == 1 and row["index"] in failed:
                row["pesq_wb"], row["failure"] = None, {"pesq_wb": "estimate is not finite"}
        write_evaluation(run, config, rows)
    page = make(runs, tmp_path / "out")
    table = page.table("PESQ-WB (MOS) ↑, higher is better: mean")
    cell = table[STUDENTS[0], "none"]
    assert cell.startswith(left)
    assert f"{len(failed)} clips without a score of every seed" in cell
    assert "without a score" not in table[STUDENTS[1], "none"]


def test_scores_of_weights_that_are_no_longer_there_are_named(tmp_path):
    config = config_of("none", 0)
    run = make_run(tmp_path / "runs" / "one", config)
    scores = run.path / "evaluate" / "dns-best" / "scores.json"
    record = read_json(scores)
    for name in STUDENTS:
        record["networks"][name]["step"] = 20
        size = students.get(name)
        weights = build(size).state_dict()
        step = 30 if name == STUDENTS[0] else 20
        modelfile.save(run.weights(name, "best"), weights, name=name, size=size, step=step)
    write_json(scores, record)
    page = make(tmp_path / "runs", tmp_path / "out")
    assert f"the scores of {STUDENTS[0]} are of step 20, and its best weights of step 30 by now" in page.text
    assert f"the scores of {STUDENTS[1]} are of step" not in page.text


def test_names_that_are_no_utf_8_are_escaped(tmp_path):
    run = make_run(tmp_path / "runs" / "cafe", config_of("none", 0))
    run.path.rename(tmp_path / "runs" / os.fsdecode(b"caf\xe9"))
    assert "caf\\udce9" in make(tmp_path / "runs", tmp_path / "out").text


def rows_of(run: RunDir) -> list[dict[str, Any]]:
    lines = (run.path / "evaluate" / "dns-best" / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_same_experiment_twice_counts_once(tmp_path):
    make_run(tmp_path / "runs" / "first", config_of("none", 0))
    make_run(tmp_path / "runs" / "second", config_of("none", 0), gain=3.0)
    page = make(tmp_path / "runs", tmp_path / "out")
    assert "second: manner-s-0.6gf on dns-best / test_a is left out: it is the same experiment" in page.text
    once = make_run(tmp_path / "alone" / "first", config_of("none", 0)).path.parent
    expected = make(once, tmp_path / "out2").table("PESQ-WB (MOS) ↑, higher is better: mean")
    assert page.table("PESQ-WB (MOS) ↑, higher is better: mean") == expected


def test_runs_that_began_with_other_weights_are_another_method(tmp_path):
    """By what the weights are, not by where they lay."""
    for name, options, init in (
        ("alone", (), None),
        ("tuned", ("--train.init=/a",), "ab" * 32),
        ("again", ("--train.init=/b", "--seed=1"), "ab" * 32),
    ):
        run = make_run(tmp_path / "runs" / name, config_of("none", 0, *options))
        if init:
            write_json(run.inputs, read_json(run.inputs) | {"init": {STUDENTS[0]: {"sha256": init}}})
    page = make(tmp_path / "runs", tmp_path / "out")
    heads = {head for _, head in page.table("PESQ-WB (MOS) ↑, higher is better: mean")}
    assert sorted(one for one in heads if "train.init" in one) == [
        "none (train.init )",
        "none (train.init abababab)",
    ]


def test_how_often_a_run_is_saved_makes_no_other_method_of_it(tmp_path):
    for seed, every in ((0, 10), (1, 20)):
        config = config_of("none", seed, f"--train.save_every={every}")
        make_run(tmp_path / "runs" / str(seed), config)
    page = make(tmp_path / "runs", tmp_path / "out")
    assert {head for _, head in page.table("PESQ-WB (MOS) ↑, higher is better: mean")} >= {"none"}


def test_hours_and_energy_are_those_of_the_rows(tmp_path):
    run = make_run(tmp_path / "runs" / "measured", config_of("none", 0))
    environment = json.loads(run.environment.read_text())
    write_json(run.environment, {**environment, "host": "node-3", "ranks": {"world_size": 3}})
    # The student with the longest history counts: both are trained at once.
    for name, speed, apart in ((STUDENTS[0], 4.0, 0.5), (STUDENTS[1], 8.0, 0.0)):
        rows = [{"step": step, "audio_seconds_per_second": speed} for step in (20, 40)]
        rows[1]["time"] = {"forward": 1 - apart, "checkpoint": apart}
        rows[0]["joules"], rows[1]["joules"] = 2.7e6, 5.4e6
        run.history(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = make(tmp_path / "runs", tmp_path / "out")
    spent = page.table("What was spent")
    # 40 steps of 32 segments of 4 s; half of the last 20 steps' time went into a checkpoint.
    seconds_of_audio = 40 * 32 * 4
    hours = (seconds_of_audio / 2 / 4 + seconds_of_audio / 2 / 4 / 0.5) / 3600
    assert numbers(spent["measured", "hours"]) == pytest.approx([hours], abs=6e-3)
    assert numbers(spent["measured", "GPU or CPU hours"]) == pytest.approx([3 * hours], abs=6e-3)
    assert spent["measured", "processes"] == "3, CPU"
    assert spent["measured", "kWh"] == "2.25"  # 8.1 MJ
    assert f"In all: {3 * hours:.2f} CPU hours." in page.text
    assert "on node-3" in page.text


def test_nothing_is_the_same_in_all_where_nothing_is(tmp_path):
    make_run(tmp_path / "runs" / "a", config_of("none", 0))
    other = ["--data.train=/other", "--data.segment_seconds=2", "--train.steps=50", "--train.batch=16"]
    other += ["--train.micro_batch=1", "--optim.lr=0.5", "--optim.schedule=constant"]
    make_run(tmp_path / "runs" / "b", config_of("mvat", 0, *other))
    text = make(tmp_path / "runs", tmp_path / "out").text
    assert "The same in all: none of data.train, data.segment_seconds, train.steps," in text


def test_a_student_of_another_size_is_another_student(tmp_path):
    def sized(**hidden: int) -> list[str]:
        sizes = {name: {"kind": "small", "hidden": width} for name, width in hidden.items()}
        return ["--sizes", json.dumps(sizes), "--student", ",".join(hidden)]

    make_run(tmp_path / "runs" / "a", config_of("none", 0, *sized(mine=9)))
    make_run(tmp_path / "runs" / "b", config_of("none", 1, *sized(mine=12, more=9)), gain=3.0)
    make_run(tmp_path / "runs" / "c", config_of("none", 2, *sized(more=12)))
    page = make(tmp_path / "runs", tmp_path / "out")
    assert re.search(
        r"runs/b is left out: its mine is of another size than that of the runs before", page.text
    )
    # What is left out has no say in what comes after it.
    assert "runs/c is left out" not in page.text
    table = page.table("PESQ-WB (MOS) ↑, higher is better: mean")
    make_run(tmp_path / "others" / "a", config_of("none", 0, *sized(mine=9)))
    make_run(tmp_path / "others" / "c", config_of("none", 2, *sized(more=12)))
    expected = make(tmp_path / "others", tmp_path / "out2").table("PESQ-WB (MOS) ↑, higher is better: mean")
    assert table == expected


def test_mistakes_are_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"no run to report on .*it has no config\.yaml"):
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    make_run(tmp_path / "runs" / "one", config_of("none", 0))
    with pytest.raises(UserError, match="is a file: give a folder"):
        main([str(tmp_path / "runs" / "one"), "--out", str(tmp_path / "file")])
    for wrong in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match=f"--audio-mb is {wrong}: give megabytes, 0 or more"):
            main([str(tmp_path / "runs" / "one"), "--audio-mb", wrong])
    assert not (tmp_path / "out").exists()
    assert html.unescape(capsys.readouterr().out) == ""
