"""The report against its rows: figures, the twin, damage, names that are HTML, colours, commands."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from mvat_dist import configfile, evaluate, modelfile
from mvat_dist.config import Config
from mvat_dist.errors import UserError
from mvat_dist.files import read_json, write_json
from mvat_dist.models import build
from mvat_dist.report import main
from mvat_dist.reporting import provenance, style
from mvat_dist.reporting.runs import Reader
from mvat_dist.rundir import RunDir
from mvat_dist.students import Size
from tests.report_runs import config_of, make_run, write_evaluation
from tests.signals import noise_at, syllables
from tests.tiny_corpus import write_pairs

STUDENTS = ("manner-s-0.6gf", "manner-s-2.0gf")
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """A page's elements, and its tables by caption."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.elements.append((tag, found))
        if tag in VOID:
            if tag == "br":
                self._add("\n")
            return
        self.open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(found["aria-label"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "small":
            self._add("|")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self._add(data)

    def _add(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self._rows[-1][-1] += data

    def table(self, start: str) -> dict[tuple[str, str], str]:
        """Cells of the first table whose caption begins so, by row and column name."""
        rows = next(rows for caption, rows in self.tables.items() if caption.startswith(start))
        return {
            (row[0].partition("|")[0], head): cell
            for row in rows[1:]
            for head, cell in zip(rows[0][1:], row[1:], strict=True)
        }


def make(folder: Path, out: Path, *options: str) -> Page:
    """The report of all runs in a folder."""
    runs = sorted(str(one) for one in folder.iterdir())
    main([*runs, "--out", str(out), *options])
    return Page((out / "report.html").read_text())


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of five methods, in folders whose names say nothing."""
    folder = tmp_path_factory.mktemp("my runs")
    number = 0
    for seed in (0, 1):
        for method, more in (
            ("none", ()),
            ("output", ()),
            ("mvat", ()),
            ("mvat+output", ()),
            ("mvat", ("--distil.beta_channel", "0")),
        ):
            make_run(folder / f"run {number}", config_of(method, seed, *more))
            number += 1
    return folder


@pytest.fixture(scope="module")
def page(grid: Path) -> Page:
    return make(grid, grid.parent / "out")


@cache
def config_in(folder: Path) -> Config:
    return configfile.parse(["--config", str(folder / "config.yaml")])


def scores(grid: Path, method: str, student: str, metric: str, channel: float = 1.0) -> np.ndarray:
    """(seeds, clips) straight from the rows of the runs."""
    found = []
    for folder in sorted(grid.iterdir(), key=lambda one: one.name):
        config = config_in(folder)
        if config.distil.method == method and (method == "none" or config.distil.beta_channel == channel):
            lines = (folder / "evaluate" / "dns-best" / "rows.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if row["model"] == student]
            found.append([row[metric] for row in sorted(rows, key=lambda row: row["key"])])
    return np.array(found)


def numbers(text: str) -> list[float]:
    return [float(one) for one in re.findall(r"-?\d+\.\d+", text.replace("\N{MINUS SIGN}", "-"))]


@pytest.mark.parametrize(("metric", "start", "digits"), [("pesq_wb", "PESQ-WB", 2), ("stoi", "STOI", 3)])
def test_means_and_differences_are_those_of_the_rows(grid, page, metric, start, digits):
    table = page.table(f"{start}" if metric == "stoi" else "PESQ-WB (MOS) ↑, higher is better: mean")
    for student in STUDENTS:
        alone = scores(grid, "none", student, metric)
        for label, method, channel in (
            ("output", "output", 1.0),
            ("mvat", "mvat", 1.0),
            ("mvat+output", "mvat+output", 1.0),
            ("mvat without channel", "mvat", 0.0),
        ):
            ours = scores(grid, method, student, metric, channel)
            assert ours.shape == (2, 40)
            mean, low, high, difference, below, above = numbers(table[student, label])
            assert mean == pytest.approx(ours.mean(), abs=0.51 * 10**-digits)
            paired = ours.mean(0) - alone.mean(0)
            assert difference == pytest.approx(paired.mean(), abs=0.51 * 10 ** -(digits + 1))
            # Another implementation draws other resamples: the ends agree to a part of the width.
            for values, ends in ((ours.mean(0), (low, high)), (paired, (below, above))):
                other = scipy.stats.bootstrap(
                    (values,), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(1)
                ).confidence_interval
                width = max(other.high - other.low, 10**-digits)
                assert ends == pytest.approx((other.low, other.high), abs=0.15 * width)
            assert table[student, label].endswith("▲")
        assert "|" not in table[student, "none"]


def test_seeds_views_snr_and_costs_are_those_of_the_rows(grid, page):
    seeds = page.table("PESQ-WB (MOS) ↑ of each seed alone")
    for student in STUDENTS:
        ours, alone = (scores(grid, method, student, "pesq_wb") for method in ("mvat", "none"))
        assert numbers(seeds[f"{student}, mvat", "means"]) == pytest.approx(ours.mean(1), abs=6e-4)
        shown = numbers(seeds[f"{student}, mvat", "differences, seeds that both have"])
        assert shown == pytest.approx((ours - alone).mean(1), abs=6e-4)
        without = scores(grid, "mvat", student, "pesq_wb", channel=0.0)
        view = page.table("PESQ-WB (MOS) ↑: difference from all views")[student, "mvat without channel"]
        assert numbers(view)[0] == pytest.approx((without - ours).mean(), abs=6e-4)
        assert view.endswith("▼")
    lines = (grid / "run 0" / "evaluate" / "dns-best" / "rows.jsonl").read_text().splitlines()
    noisy = [row for row in map(json.loads, lines) if row["model"] == "noisy"]
    low = [row["pesq_wb"] for row in noisy if -5 <= row["snr_db"] < 0]
    buckets = page.table("PESQ-WB (MOS) ↑ by the SNR")
    cell = next(
        text for (row, head), text in buckets.items() if row == "noisy input" and head.startswith("-5")
    )
    assert numbers(cell)[0] == pytest.approx(np.mean(low), abs=6e-3)
    cost = page.table("Cost and quality")
    assert cost["manner-s-0.6gf, mvat", "GMAC for 4 s ↓"] == "0.60"
    assert cost["teacher tiny-teacher (abababab)", "parameters, millions ↓"] == "24.07"
    # 40 steps of 32 segments of 4 s at 8 s of audio per second, on two processes.
    hours = 40 * 32 * 4 / 8 / 3600
    spent = page.table("What was spent")
    assert numbers(spent["run 0", "hours"]) == pytest.approx([hours], abs=6e-3)
    assert numbers(spent["run 0", "GPU or CPU hours"]) == pytest.approx([2 * hours], abs=6e-3)


def test_the_claims_are_rows_with_what_was_found(page):
    rows = next(rows for caption, rows in page.tables.items() if caption.startswith("Claims of arXiv"))[1:]
    found = {(row[0], row[1].partition("|")[2]): row[1:] for row in rows}
    where = "dns-best / test_a, mvat"
    improves = found["MV-AT improves students of various sizes consistently", where]
    assert improves[0].startswith("holds: better for all 2 students")
    assert improves[1].count("▲") == 2
    output = found["MV-AT is better than output distillation", where]
    assert output[0].startswith("holds")
    smaller = next(
        its for (claim, place), its in found.items() if claim.startswith("15.4x") and place == where
    )
    # 24.07 M and 38.38 GMAC of the teacher against 0.90 M and 2.00 GMAC; 0.9 - 0.7 MOS worse.
    assert "manner-s-2.0gf: 26.7x fewer parameters, 19.14x fewer FLOPs" in smaller[1]
    assert smaller[0].startswith("no student is as good as its teacher")


def test_no_difference_is_not_called_one(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"a{seed}", config_of("none", seed), gain=0.5)
        make_run(tmp_path / "runs" / f"b{seed}", config_of("mvat", seed), gain=0.5)
        make_run(tmp_path / "runs" / f"c{seed}", config_of("output", seed), gain=0.4)
    page = make(tmp_path / "runs", tmp_path / "out")
    table = page.table("PESQ-WB (MOS) ↑, higher is better: mean")
    for student in STUDENTS:
        low, high = numbers(table[student, "mvat"])[-2:]
        assert low < 0 < high
        assert "▲" not in table[student, "mvat"]
        assert table[student, "output"].endswith("▼")
    assert "not shown: better for 0 of 2 students, no clear difference for the others" in page.text


def test_the_twin_has_the_same_tables(grid, page):
    text = (grid.parent / "out" / "report.md").read_text()
    twin: dict[str, list[list[str]]] = {}
    for block in re.findall(r"\*\*(.+)\*\*\n\n((?:\|.*\n)+)", text):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block[1].splitlines()]
        plain = [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in line] for line in lines]
        twin[re.sub(r"\\(.)", r"\1", block[0])] = [plain[0], *plain[2:]]
    assert twin.keys() == page.tables.keys()
    for caption, rows in page.tables.items():
        shown = [
            [re.sub(r"\|(.*?)(?= [▲▼]|$)", r" (\1)", cell).replace("\n", "; ") for cell in row]
            for row in rows
        ]
        assert twin[caption] == shown


def test_the_page_stands_alone_and_can_be_read_without_seeing_it(grid, page):
    text = (grid.parent / "out" / "report.html").read_text()
    kinds = {tag for tag, _ in page.elements}
    assert not kinds & {"script", "link", "iframe", "object", "form", "style "}
    policy = next(attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    for _, attrs in page.elements:
        assert not any(key.startswith("on") for key in attrs)
        for key in ("src", "href"):
            assert attrs.get(key, "data:").startswith(("data:", "#"))
    assert not re.search(r"url\(|@import", text)
    identities = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identities) == len(set(identities))
    for tag, attrs in page.elements:
        if tag == "svg":
            assert set(attrs["aria-labelledby"].split()) <= set(identities)
        if tag in ("audio", "table"):
            assert attrs["aria-label"]
        if tag == "img":
            assert attrs["alt"]
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0"
    links = [attrs["href"][1:] for tag, attrs in page.elements if tag == "a"]
    assert set(links) <= set(identities)


@pytest.mark.usefixtures("page")
def test_equal_input_gives_equal_bytes(grid, tmp_path):
    make(grid, tmp_path / "again")
    for name in ("report.html", "report.md"):
        assert (tmp_path / "again" / name).read_bytes() == (grid.parent / "out" / name).read_bytes()


def test_names_are_never_markup(tmp_path):
    student = "<img src=x onerror=alert(1)>"
    more = (
        "--sizes",
        json.dumps({student: {"kind": "small", "hidden": 8, "depth": 2}}),
        "--student",
        student,
    )
    make_run(
        tmp_path / "runs" / "<script>alert(2)``` <b>", config_of("none", 0, *more), subset='"><svg onload=x>'
    )
    page = make(tmp_path / "runs", tmp_path / "out")
    assert "script" not in {tag for tag, _ in page.elements}
    assert all("onerror" not in attrs and "onload" not in attrs for _, attrs in page.elements)
    assert student in page.text
    # In Markdown, what stands in a fence is shown as it is; outside of one every "<" is escaped.
    text = re.sub(r"(?ms)^(`{3,})sh\n.*?^\1$", "", (tmp_path / "out" / "report.md").read_text())
    assert not re.search(r"(?<!\\)<", text)


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


@pytest.mark.parametrize("method", ["none", "mvat+output"])
def test_the_command_of_a_run_makes_the_same_experiment(tmp_path, method):
    # A name of the table may be given to another size.
    own = {"kind": "small", "hidden": 9}
    sizes = json.dumps({"it's mine": own, "manner-s-0.9gf": own})
    config = config_of(method, 7, "--sizes", sizes, "--student", "manner-s-0.9gf,it's mine")
    RunDir(tmp_path / "a run").create(config)
    (run,) = Reader().runs([tmp_path / "a run"])
    words = shlex.split(provenance.command(run.config).replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "mvat_dist.train"]
    assert configfile.identity(configfile.parse(words[3:])) == configfile.identity(config)


def test_sounds_are_those_of_the_runs_up_to_the_limit(grid, page, tmp_path):
    heard = [
        base64.b64decode(attrs["src"].partition("base64,")[2])
        for tag, attrs in page.elements
        if tag == "audio"
    ]
    files = [grid / "run 0" / "examples" / "00" / f"{kind}.flac" for kind in ("noisy", "clean")]
    files.append(grid / "run 1" / "examples" / "00" / "teacher.flac")
    # Of four methods, those with all views, the lowest seed.
    files += [
        grid / f"run {n}" / "students" / name / "examples" / "00.flac" for name in STUDENTS for n in range(4)
    ]
    assert heard == [file.read_bytes() for file in files]
    few = make(grid, tmp_path / "few", "--audio-mb", "0.12")
    kept = [tag for tag, _ in few.elements if tag == "audio"]
    assert 0 < len(kept) < len(heard)
    assert f"{len(heard) - len(kept)} sounds are left out" in few.text
    assert "audio" not in {tag for tag, _ in make(grid, tmp_path / "none", "--audio-mb", "0").elements}


def test_students_trained_in_parts_have_their_records(tmp_path):
    run = make_run(tmp_path / "runs" / "divided", config_of("none", 0))
    for name in STUDENTS:
        part = run.path / "parts" / name
        part.mkdir(parents=True)
        (part / "students").mkdir()
        run.student(name).rename(part / "students" / name)
    page = make(tmp_path / "runs", tmp_path / "out")
    assert len(page.tables["Validation PESQ-WB (MOS) ↑: the best and the last of each run"]) == 3


def test_what_parts_cost_is_added_up(tmp_path):
    run = make_run(tmp_path / "runs" / "divided", config_of("none", 0))
    whole = json.loads(run.environment.read_text())
    run.environment.unlink()
    for name, processes, speed, apart in ((STUDENTS[0], 3, 4.0, 0.0), (STUDENTS[1], 1, 8.0, 0.5)):
        part = RunDir(run.path / "parts" / name)
        part.students.mkdir(parents=True)
        run.student(name).rename(part.student(name))
        rows = [{"step": step, "audio_seconds_per_second": speed} for step in (20, 40)]
        rows[1]["time"] = {"forward": 1 - apart, "checkpoint": apart}
        rows[0]["joules"], rows[1]["joules"] = 0.9e6 * processes, 1.8e6 * processes
        part.history(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_json(
            part.environment, {**whole, "host": f"node-{processes}", "ranks": {"world_size": processes}}
        )
    page = make(tmp_path / "runs", tmp_path / "out")
    spent = page.table("What was spent")
    # 40 steps of 32 segments of 4 s; half of the second one's last 20 steps' time went into a checkpoint.
    heard = 40 * 32 * 4
    first, second = heard / 4 / 3600, (heard / 2 / 8 + heard / 2 / 8 / 0.5) / 3600
    assert numbers(spent["divided", "hours"]) == pytest.approx([first + second], abs=6e-3)
    assert numbers(spent["divided", "GPU or CPU hours"]) == pytest.approx([3 * first + second], abs=6e-3)
    assert spent["divided", "processes"] == "3 + 1, CPU"
    assert spent["divided", "kWh"] == "3"  # 2.7 MJ by the GPUs of each process
    assert f"In all: {3 * first + second:.2f} CPU hours." in page.text
    assert "on node-3" in page.text
    assert "on node-1" in page.text


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


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_colours_have_enough_contrast(colours):
    def contrast(name: str, ground: str) -> float:
        low, high = sorted(luminance(colours[one]) for one in (name, ground))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "muted", "link", "better", "worse"):
        assert contrast(name, "ground") >= 4.5
    assert contrast("ink", "raised") >= 4.5
    assert all(contrast(f"s{number}", "ground") >= 3 for number in range(style.STYLES))
    for name, value in colours.items():
        assert f"--{name}:{value}" in style.STYLE


def test_what_evaluate_writes_is_what_the_report_reads(tmp_path):
    run = RunDir(tmp_path / "runs" / "real")
    size = {"kind": "small", "hidden": 6, "depth": 2}
    run.create(config_of("none", 0, "--sizes", json.dumps({"tiny": size}), "--student", "tiny"))
    modelfile.save(
        run.weights("tiny", "best"), build(Size(**size)).state_dict(), name="tiny", size=Size(**size), step=1
    )
    clean = {f"utt_{number}": syllables(1.0, seed=number) for number in range(3)}
    pairs = {key: (one + noise_at(one, 3.0), one) for key, one in clean.items()}
    write_pairs(tmp_path / "shards", "test_a", pairs)
    options = ["--metrics", "si_sdr,stoi", "--processes", "1"]
    evaluate.main([str(run.path), "--data", str(tmp_path / "shards"), *options])
    page = make(tmp_path / "runs", tmp_path / "out")
    told = json.loads((run.path / "evaluate" / "shards-best" / "scores.json").read_text())
    scored = told["sections"]["test_a"]["scores"]
    network = told["networks"]["tiny"]
    cost = page.table("Cost and quality")
    assert numbers(cost["tiny, none", "real-time factor ↓"]) == [round(network["real_time_factor"], 3)]
    for label, metric, digits in (("SI-SDR (dB) ↑", "si_sdr", 2), ("STOI ↑", "stoi", 3)):
        for row, start in (("noisy input", "What there is to compare with"), ("tiny", f"{label}, higher")):
            known = scored["noisy" if row == "noisy input" else row][metric]
            expected = [round(known[key], digits) for key in ("mean", "low", "high")]
            cell = page.table(start)[row, label if row == "noisy input" else "none"]
            assert numbers(cell) == pytest.approx(expected, abs=1.1 * 10**-digits)


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
