"""Evaluation end to end on a small run: rows, table, shares of ranks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from mvat_dist.config.sizes import Size, parameters
from mvat_dist.distributed import collectives
from mvat_dist.errors import UserError
from mvat_dist.evaluate import main
from mvat_dist.evaluation import real_time_factor
from mvat_dist.evaluation.metrics.registry import GROUPS, METRICS
from mvat_dist.evaluation.metrics.si_sdr import si_sdr
from mvat_dist.evaluation.statistics import mean_interval, statistics_by_model
from mvat_dist.evaluation.validate import validate
from mvat_dist.io import write_json
from mvat_dist.models import weights
from mvat_dist.models.manner import build
from mvat_dist.runs.folder import RunDir
from tests.mistakes import assert_refused
from tests.ranks_harness import on_ranks
from tests.signals import noise_at, syllables
from tests.tiny_corpus import write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"tiny-a": Size("small", 8, depth=2), "tiny-b": Size("small", 6, depth=2)}
TEACHER = Size("small", 10, depth=2)
CPU = torch.device("cpu")


def some_pairs(count: int, seconds: float = 1.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Noisy and clean by key; SNRs 0, 2, 4 ... dB."""
    cleans = [syllables(seconds, seed=number) for number in range(count)]
    return {f"utt_{n}": (clean + noise_at(clean, 2.0 * n), clean) for n, clean in enumerate(cleans)}


def save(file: Path, name: str, size: Size, step: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    weights.save(file, build(size).state_dict(), name=name, size=size, step=step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder with two students, best and last, and a teacher elsewhere."""
    folder = RunDir(tmp_path / "runs" / "a run")
    for name, size in TINY.items():
        save(folder.weights(name, "best"), name, size, 10)
        save(folder.weights(name, "last"), name, size, 20, seed=1)
    teacher = tmp_path / "teacher.safetensors"
    save(teacher, "tiny-teacher", TEACHER, 99)
    sha256 = weights.fingerprint(weights.load(teacher).model)
    write_json(folder.inputs, {"teacher": {"file": str(teacher), "sha256": sha256}})
    folder.config.write_text("student: tiny-a,tiny-b\n")
    return folder.path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two test sets and a validation set; the first clip of test_b is silent in its clean half."""
    folder = tmp_path / "shards"
    pairs = some_pairs(3)
    write_pairs(folder, "valid", {"held_out": pairs["utt_1"]})
    write_pairs(folder, "test_a", {f"a_{key}": pair for key, pair in pairs.items()})
    silent = (0.1 * noise_at(pairs["utt_0"][1], 0), np.zeros(16000, np.float32))
    write_pairs(folder, "test_b", {"b_0": silent, "b_1": pairs["utt_2"]})
    return folder


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_rows_hold_what_the_metrics_say_of_each_network(run, corpus, capsys):
    main([str(run), "--data", str(corpus), "--metrics", "si_sdr,stoi", "--processes", "2"])
    out = run / "evaluate" / "shards-best"
    rows = rows_of(out)
    names = ["noisy", "teacher", "tiny-a", "tiny-b"]
    assert [(row["subset"], row["key"], row["model"]) for row in rows] == [
        (subset, key, name)
        for subset, keys in (("test_a", ["a_utt_0", "a_utt_1", "a_utt_2"]), ("test_b", ["b_0", "b_1"]))
        for key in keys
        for name in names
    ]
    # The third clip of test_a, without validate(): what was packed, through the network, to the metric.
    noisy, clean = (np.round(signal * 32768) / 32768 for signal in some_pairs(3)["utt_2"])
    student = weights.load(RunDir(run).weights("tiny-b", "best")).model
    with torch.no_grad():
        estimate = student(torch.from_numpy(noisy.astype(np.float32))[None])[0].numpy()
    row = next(row for row in rows if row["key"] == "a_utt_2" and row["model"] == "tiny-b")
    assert row["si_sdr"] == pytest.approx(si_sdr(estimate, clean).value, abs=1e-3)
    assert row["duration_s"] == 1.0
    assert row["snr_db"] == pytest.approx(4.0, abs=0.02)
    assert row["failure"] is None
    silent = [row for row in rows if row["key"] == "b_0"]
    assert all(row["si_sdr"] is None and row["snr_db"] is None for row in silent)
    assert all(row["failure"] == {"si_sdr": "silent reference", "stoi": "silent reference"} for row in silent)

    printed = capsys.readouterr().out
    assert printed.startswith((out / "scores.md").read_text().rstrip())
    assert "| teacher (tiny-teacher) |" in printed
    assert "- silent reference: 1 of 2 clips without SI-SDR, STOI of noisy, teacher, tiny-a" in printed


def test_the_record_has_means_over_valid_clips_and_costs(run, corpus, capsys):
    main([str(run), "--data", str(corpus), "--metrics", "paper"])
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| network"))
    assert all(METRICS[name].label in header for name in GROUPS["paper"])
    record = json.loads((run / "evaluate" / "shards-best" / "scores.json").read_text())
    values = [r["si_sdr"] for r in rows_of(run / "evaluate" / "shards-best") if r["model"] == "tiny-a"]
    a, b = (record["sections"][name]["scores"]["tiny-a"]["si_sdr"] for name in ("test_a", "test_b"))
    assert a["mean"] == pytest.approx(np.mean(values[:3]))
    assert (b["mean"], b["clips"], b["failed"]) == (pytest.approx(values[4]), 1, {"silent reference": 1})
    network = record["networks"]["tiny-a"]
    assert network["parameters"] == parameters(TINY["tiny-a"])
    assert network["real_time_factor"] > 0
    assert [one["step"] for one in record["networks"].values()] == [99, 10, 10]


def test_last_weights_one_subset_and_a_single_model_file(run, corpus, tmp_path):
    main([str(run), "--data", str(corpus / "valid"), "--metrics", "si_sdr", "--weights", "last"])
    record = json.loads((run / "evaluate" / "valid-last" / "scores.json").read_text())
    assert list(record["sections"]) == ["valid"]
    assert record["networks"]["tiny-b"]["step"] == 20

    one = RunDir(run).weights("tiny-a", "best")
    main([str(one), "--data", str(corpus / "valid"), "--metrics", "si_sdr", "--out", str(tmp_path / "out")])
    assert [row["model"] for row in rows_of(tmp_path / "out")] == ["noisy", "tiny-a"]


def test_plain_folders_limits_and_a_corpus_without_test_sets(run, tmp_path):
    for side in ("noisy", "clean"):
        (tmp_path / "plain" / side).mkdir(parents=True)
    for key, (noisy, clean) in some_pairs(4, seconds=1.5).items():
        soundfile.write(tmp_path / "plain" / "noisy" / f"{key}.wav", noisy, 16000)
        soundfile.write(tmp_path / "plain" / "clean" / f"{key}.wav", clean, 16000)
    base = [str(run), "--metrics", "si_sdr", "--out", str(tmp_path / "out"), "--data"]
    main([*base, str(tmp_path / "plain"), "--limit", "2", "--max-seconds", "1.25"])
    rows = rows_of(tmp_path / "out")
    assert len({row["key"] for row in rows}) == 2
    assert {row["duration_s"] for row in rows} == {1.25}

    write_pairs(tmp_path / "untested", "train_pairs", some_pairs(1))
    with pytest.raises(UserError, match=r"no subset test_\* or valid .* it has train_pairs"):
        main([*base, str(tmp_path / "untested")])


def test_a_teacher_that_has_moved_away_is_left_out(run, corpus, tmp_path, capsys):
    (tmp_path / "teacher.safetensors").unlink()
    main([str(run), "--data", str(corpus / "valid"), "--metrics", "si_sdr"])
    assert {row["model"] for row in rows_of(run / "evaluate" / "valid-best")} == {"noisy", "tiny-a", "tiny-b"}
    assert "is no longer at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "nowhere"}, "no model at"),
        ({"run": "empty"}, "empty"),
        ({"run": "young"}, "holds no trained student yet"),
        ({"run": "notes.txt"}, "notes.txt"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--data": "empty"}, "empty"),
        ({"--metrics": "pesq_web"}, "unknown metric 'pesq_web'; did you mean 'pesq_wb'"),
        ({"--limit": "-1"}, "--limit is -1"),
        ({"--out": "notes.txt"}, "is a file: give a folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, corpus, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("young").mkdir()
    Path("young/config.yaml").write_text("student: all\n")
    Path("notes.txt").write_text("nothing")
    given = {"run": str(run), "--data": str(corpus)} | change
    argv = [given.pop("run"), *(part for option in given.items() for part in option)]
    before = sorted(tmp_path.rglob("*"))
    assert_refused(main, argv, message, capsys)
    assert sorted(tmp_path.rglob("*")) == before


class Attenuator(nn.Module):
    """A network that halves its input, counts its passes and notes the modes it was run in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.frozen = nn.BatchNorm1d(1).eval()
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return 0.5 * noisy + 0 * self.frozen(self.norm(noisy[:, None]))[:, 0]


def clips_of(count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    return [(key, noisy, clean) for key, (noisy, clean) in some_pairs(count).items()]


def test_validation_leaves_networks_as_they_were():
    network = Attenuator()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    rows = validate({"half": network}, clips_of(2), ["si_sdr"], device=CPU)
    assert network.modes == [(False, False)] * 2
    assert (network.training, network.norm.training, network.frozen.training) == (True, True, False)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    # Scale-invariant: half the input scores as the input does.
    assert [row["si_sdr"] for row in rows] == pytest.approx([si_sdr(n, c).value for _, n, c in clips_of(2)])


def test_ranks_share_the_clips():
    clips = clips_of(5)
    alone = validate({"half": Attenuator()}, clips, ["si_sdr"], device=CPU, noisy=True)
    networks = [Attenuator() for _ in range(3)]
    shares = [
        validate({"half": network}, clips, ["si_sdr"], device=CPU, noisy=True, rank=rank, world_size=3)
        for rank, network in enumerate(networks)
    ]
    assert [len(share) for share in shares] == [4, 4, 2]
    assert [len(network.modes) for network in networks] == [2, 2, 1]
    gathered = validate(
        {"half": Attenuator()}, clips, ["si_sdr"], device=CPU, noisy=True, world_size=3,
        gather=lambda rows: [rows, *shares[1:]],
    )  # fmt: skip
    assert gathered == alone


def _score_on_rank(rank: int) -> list[float]:
    rows = validate(
        {"half": Attenuator()}, clips_of(3), ["pesq_wb", "si_sdr"], device=CPU,
        rank=rank, world_size=2, gather=collectives.all_gather_object,
    )  # fmt: skip
    return [row[name] for row in rows for name in ("pesq_wb", "si_sdr")]


def test_validation_inside_a_process_group(tmp_path):
    alone = validate({"half": Attenuator()}, clips_of(3), ["pesq_wb", "si_sdr"], device=CPU)
    expected = [row[name] for row in alone for name in ("pesq_wb", "si_sdr")]
    assert on_ranks(2, _score_on_rank, tmp_path) == [expected, expected]


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        mean, low, high = mean_interval(generator.normal(1.0, 2.0, 60).tolist(), seed)
        assert low < mean < high
        covered += low <= 1.0 <= high
    assert 88 <= covered <= 99  # 95 of 100 expected; four standard deviations of the binomial below
    assert mean_interval([2.5]) == (2.5, None, None)  # one clip says nothing of others
    assert mean_interval([2.5, 2.5]) == (2.5, 2.5, 2.5)
    assert mean_interval([1.0, 2.0, 4.0], seed=7) == mean_interval([1.0, 2.0, 4.0], seed=7)


def test_summary_leaves_failures_out_of_the_mean_and_counts_them():
    rows = [
        {"model": "net", "stoi": 0.5, "failure": None},
        {"model": "net", "stoi": None, "failure": {"stoi": "silent estimate"}},
        {"model": "net", "stoi": 1.0, "failure": None},
        {"model": "dead", "stoi": None, "failure": {"stoi": "silent estimate"}},
    ]
    found = statistics_by_model(rows, ["stoi"])
    assert (found["net"]["stoi"].mean, found["net"]["stoi"].clips) == (0.75, 2)
    assert found["net"]["stoi"].failed == {"silent estimate": 1}
    assert (found["dead"]["stoi"].mean, found["dead"]["stoi"].clips) == (None, 0)


def test_real_time_factor_is_measured_on_one_thread():
    seen = []

    class Spy(nn.Module):
        def forward(self, noisy: torch.Tensor) -> torch.Tensor:
            seen.append((tuple(noisy.shape), torch.get_num_threads()))
            return noisy

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        factor = real_time_factor.real_time_factor(Spy(), seconds=0.5, runs=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [((1, 8000), 1)] * 4
    assert 0 < factor < 0.1
