"""The report against its rows: figures, the twin, damage, names that are HTML, colours, commands."""

from __future__ import annotations

import base64
import json
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from mvat_dist import evaluate
from mvat_dist.config import parser
from mvat_dist.config.schema import Config
from mvat_dist.config.sizes import Size
from mvat_dist.evaluation.report import provenance
from mvat_dist.evaluation.report.load import load_runs
from mvat_dist.evaluation.report.plot import STYLES
from mvat_dist.models import weights
from mvat_dist.models.manner import build
from mvat_dist.runs.folder import RunDir
from tests.report_page import Page, make, numbers
from tests.report_runs import config_of, make_run
from tests.signals import noise_at, syllables
from tests.tiny_corpus import write_pairs

STUDENTS = ("manner-s-0.6gf", "manner-s-2.0gf")


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
    return parser.parse(["--config", str(folder / "config.yaml")])


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
        assert attrs.get("xlink:href", "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    identities = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identities) == len(set(identities))
    for tag, attrs in page.elements:
        if tag in ("audio", "table", "svg"):
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


@pytest.mark.parametrize("method", ["none", "mvat+output"])
def test_the_command_of_a_run_makes_the_same_experiment(tmp_path, method):
    # A name of the table may be given to another size.
    own = {"kind": "small", "hidden": 9}
    sizes = json.dumps({"it's mine": own, "manner-s-0.9gf": own})
    config = config_of(method, 7, "--sizes", sizes, "--student", "manner-s-0.9gf,it's mine")
    RunDir(tmp_path / "a run").create(config)
    (run,) = load_runs([tmp_path / "a run"], [])
    words = shlex.split(provenance.train_command(run.config).replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "mvat_dist.train"]
    assert parser.fingerprint(parser.parse(words[3:])) == parser.fingerprint(config)


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


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.usefixtures("page")
def test_colours_have_enough_contrast(grid, dark):
    text = (grid.parent / "out" / "report.html").read_text()
    sheets = re.findall(r":root\{(.*?)\}", text, re.DOTALL)
    colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", sheets[dark]))

    def contrast(name: str, ground: str) -> float:
        low, high = sorted(luminance(colours[one]) for one in (name, ground))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "muted", "link", "better", "worse"):
        assert contrast(name, "ground") >= 4.5
    assert contrast("ink", "raised") >= 4.5
    assert all(contrast(f"s{number}", "ground") >= 3 for number in range(STYLES))
    # Every colour of a plot is one of these, so that it follows the ground.
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= colours.keys()
    assert not re.search(r'style="[^"]*#', text)


def test_what_evaluate_writes_is_what_the_report_reads(tmp_path):
    run = RunDir(tmp_path / "runs" / "real")
    size = {"kind": "small", "hidden": 6, "depth": 2}
    run.create(config_of("none", 0, "--sizes", json.dumps({"tiny": size}), "--student", "tiny"))
    weights.save(
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
