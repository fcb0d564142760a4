"""What a report may not say: verdicts of one seed, speeds of several machines as one, damaged numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvat_dist.io import read_json, write_json
from mvat_dist.report import main
from mvat_dist.runs.folder import RunDir
from tests.report_runs import config_of, make_run, write_evaluation

STUDENTS = ("manner-s-0.6gf", "manner-s-2.0gf")


def twin(runs: Path) -> list[str]:
    """The lines of the report of all runs in a folder, as Markdown without its escapes."""
    main([*map(str, sorted(runs.iterdir())), "--out", str(runs.parent / "out")])
    return (runs.parent / "out" / "report.md").read_text().replace("\\", "").splitlines()


def cells(lines: list[str], *starts: str) -> list[str]:
    """The cells of the first table row whose first cells begin so."""
    for line in lines:
        found = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and all(cell.startswith(s) for cell, s in zip(found, starts, strict=False)):
            return found
    raise AssertionError(f"no row begins with {starts}")


def rows_of(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "evaluate/dns-best/rows.jsonl").read_text().splitlines()]


def seeds_of(runs: Path, gains: dict[int, float]) -> None:
    """Training alone and MV-AT by seed; MV-AT is that much better, on every clip and student."""
    for seed, gain in gains.items():
        for method, above in (("none", 0.0), ("mvat", gain)):
            config = config_of(method, seed)
            run = make_run(runs / f"{method} {seed}", config, gain=0.5)
            rows = rows_of(run)
            for row in rows:
                if row["model"] in STUDENTS:
                    row["pesq_wb"] = 2.0 + row["index"] / 100 + above
            write_evaluation(run, config, rows)


@pytest.mark.parametrize(
    ("gains", "reading"),
    [
        ({0: 0.3}, "holds: better for all 2 students (one seed)"),
        ({0: 0.3, 1: 0.1}, "holds: better for all 2 students"),
        (
            {0: 0.3, 1: -0.1},
            f"not shown: better for all 2 students; the seeds disagree: {', '.join(STUDENTS)}",
        ),
    ],
    ids=["one seed", "two seeds", "seeds that disagree"],
)
def test_a_verdict_says_how_many_seeds_it_rests_on(tmp_path, gains, reading):
    seeds_of(tmp_path / "runs", gains)
    claim = cells(twin(tmp_path / "runs"), "MV-AT improves students")
    assert claim[1].removesuffix(" (dns-best / test_a, mvat)") == reading


def test_as_good_as_the_teacher_says_how_many_seeds_too(tmp_path):
    seeds_of(tmp_path / "runs", {0: 0.3, 1: 0.1})
    for run in (tmp_path / "runs").iterdir():
        folder = RunDir(run)
        rows = rows_of(folder)
        for row in rows:
            if row["model"] == "teacher":
                row["pesq_wb"] = 2.0 + row["index"] / 100 + 0.25
        (run / "evaluate/dns-best/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # +0.05 and -0.15 beside the teacher: within 0.1 MOS on the mean, but for one of the seeds alone.
    claim = cells(twin(tmp_path / "runs"), "15.4x fewer")
    assert "is as good as its teacher to within 0.1 MOS" in claim[1]
    assert f"the seeds disagree: {STUDENTS[0]}" in claim[1]


def test_real_time_factors_are_those_of_one_machine(tmp_path):
    """The slow machine timed one student; its factors must not move those of the other machine."""
    for number, (machine, names, factor) in enumerate(
        (("fast", STUDENTS, 0.1), ("slow", STUDENTS[:1], 0.9), ("slow", STUDENTS[:1], 0.8))
    ):
        run = make_run(tmp_path / "runs" / f"run {number}", config_of("none", number))
        scores = run.path / "evaluate" / "dns-best" / "scores.json"
        record = read_json(scores)
        for name, network in record["networks"].items():
            network["real_time_factor"] = factor if name in names else None
        write_json(scores, record | {"machine": machine})
    lines = twin(tmp_path / "runs")
    for name in STUDENTS:
        assert cells(lines, f"{name}, none", "0.9")[3] == "0.100"
    told = (
        "Real-time factors were measured on: fast; those of slow do not compare with them and are left out."
    )
    assert any(told in line for line in lines)


def test_what_a_damaged_record_says_is_unknown(tmp_path):
    run = make_run(tmp_path / "runs" / "torn", config_of("none", 0))
    write_json(run.status, read_json(run.status) | {"step": "x", "state": ["odd"]})
    for name in STUDENTS:
        lines = run.history(name).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        rows[0]["audio_seconds_per_second"] = 1e-320
        run.history(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = twin(tmp_path / "runs")
    assert any("In all: nothing known." in line for line in lines)
    spent = cells(lines, "torn", "unknown")
    assert spent[2] == "unknown of 40"
    assert spent[4:6] == ["-", "-"]
    assert not any("inf" in cell for cell in spent)


def test_a_single_clip_has_no_interval(tmp_path):
    for method in ("none", "mvat"):
        make_run(tmp_path / "runs" / method, config_of(method, 0), clips=1)
    lines = twin(tmp_path / "runs")
    mean = rows_of(RunDir(tmp_path / "runs" / "none"))[1]["pesq_wb"]
    taught = rows_of(RunDir(tmp_path / "runs" / "mvat"))[2]["pesq_wb"]
    found = cells(lines, STUDENTS[0], f"{mean:.2f}")
    assert found[1] == f"{mean:.2f}"
    assert found[2] == f"{taught:.2f} ({np.round(taught - mean, 3):+.3f})"


def test_an_evaluation_against_the_noisy_input_is_read(tmp_path):
    run = make_run(tmp_path / "runs" / "one", config_of("none", 0))
    scores = run.path / "evaluate" / "dns-best" / "scores.json"
    write_json(scores, read_json(scores) | {"reference": "noisy", "metrics": {"pesq_wb": {}}})
    assert any("--against noisy" in line for line in twin(tmp_path / "runs"))
