"""Exported files compute what the network computes, at every length, and nothing else is kept."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import soundfile
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import mvat_dist
from mvat_dist.config.sizes import SIZES, Size
from mvat_dist.errors import UserError, exit_code
from mvat_dist.export import main
from mvat_dist.inference import export, graph
from mvat_dist.models import metadata
from mvat_dist.models import weights as modelfile
from mvat_dist.models.manner import Manner
from mvat_dist.runs.weights import resolve
from mvat_dist.training.teacher import LiveTeacher
from tests.conftest import REPOSITORY
from tests.export_runs import a_run, a_test_set
from tests.mistakes import assert_refused
from tests.networks import TINY, loud
from tests.signals import noise_at, syllables

ODD = Size("base", 7, depth=2, chunk=10, kernel_size=5, stride=3, heads=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "a run")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return a_test_set(tmp_path_factory.mktemp("some clips"))


@pytest.fixture(scope="module")
def exported(run, clips, tmp_path_factory) -> Path:
    """Every format of the run."""
    out = tmp_path_factory.mktemp("a release")
    main(["--model", str(run), "--data", str(clips), "--out", str(out), "--licence", "CC0-1.0"])
    return out


def test_variances_beyond_16_bits_are_kept_in_fp16(clips, tmp_path):
    """As those of a trained network are: the largest half is 65504."""
    model = loud(TINY)
    variance = model.manner_block.in_conv[1].running_var
    weight = model.manner_block.in_conv[1].weight.data
    variance.fill_(1e6)
    weight.mul_(1e3)  # so that what comes out is as large as before
    file = tmp_path / "wide.safetensors"
    modelfile.save(file, model.state_dict(), name="wide", size=TINY, step=1)
    main(["--model", str(file), "--data", str(clips), "--out", str(tmp_path), "--formats", "fp16"])
    found = modelfile.load(tmp_path / "wide.fp16.safetensors").model
    assert torch.equal(found.manner_block.in_conv[1].running_var, variance)
    assert (tmp_path / "wide.fp16.safetensors").stat().st_size < 0.7 * file.stat().st_size


# --- the graph ------------------------------------------------------------------------------------


@given(
    samples=st.integers(1, 20000),
    kernel_size=st.integers(1, 9),
    stride=st.integers(1, 5),
    depth=st.integers(1, 4),
)
def test_the_padded_length_in_closed_form(samples, kernel_size, stride, depth):
    size = Size("base", 6, depth=depth, kernel_size=max(kernel_size, stride), stride=stride)
    assert graph.padded_length(size, samples) == size.frames(samples)[0]


@pytest.mark.parametrize("size", [TINY, ODD, SIZES["manner-s-0.6gf"]], ids=["tiny", "odd", "0.6gf"])
def test_files_compute_what_the_network_computes_at_lengths_that_no_trace_has_seen(size, tmp_path):
    made = loud(size)
    graph.save_torchscript(made, tmp_path / "a.pt")
    graph.save_onnx(made, tmp_path / "a.onnx", {})
    noise = 0.1 * np.random.default_rng(0).standard_normal((3, 17001)).astype(np.float32)
    for run in (graph.load_torchscript(tmp_path / "a.pt"), graph.load_onnx(tmp_path / "a.onnx")):
        for batch, samples in [(1, 1), (3, 2), (2, 84), (1, 339), (2, 5000), (1, 17001)]:
            noisy = noise[:batch, :samples]
            with torch.no_grad():
                expected = made(torch.from_numpy(noisy)).numpy()
            np.testing.assert_allclose(
                run(noisy), expected, rtol=0, atol=2e-5 * max(0.1, np.abs(expected).max())
            )


def test_batch_norm_is_folded_and_batch_and_time_are_free(exported):
    graph = onnx.load(exported / "tiny.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    for value in (graph.input[0], graph.output[0]):
        assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == ["batch", "time"]
    assert "batch_norm" not in str(torch.jit.load(exported / "tiny.pt").inlined_graph)


# --- what an export is ----------------------------------------------------------------------------


def test_an_export_is_its_files_and_a_card(exported):
    names = ["tiny.fp16.safetensors", "tiny.md", "tiny.onnx", "tiny.pt", "tiny.safetensors"]
    assert sorted(file.name for file in exported.iterdir()) == names
    card = (exported / "tiny.md").read_text()
    sha256 = modelfile.fingerprint(modelfile.load(exported / "tiny.safetensors").model)
    with zipfile.ZipFile(exported / "tiny.pt") as archive:
        assert archive.read("tiny/extra/sha256").decode() == sha256
    for fact in (sha256, "CC0-1.0", "teacher manner-b, SHA-256 abc123", "seed 5",
                 "began as old-tiny, SHA-256 def456", "90 steps of 8 segments",
                 "loss of the authors, and waveform 1\n",
                 "| tiny      | **2.50** [2.25, 2.75]", "| log-mmse  | 2.30",
                 "c0ffee", "`tiny.onnx`"):  # fmt: skip
        assert fact in card
    assert "3.90" not in card
    assert "secret" not in card


def test_weights_are_the_trained_ones_with_their_origin(run, exported):
    before, after = modelfile.load(resolve(run)), modelfile.load(exported / "tiny.safetensors")
    assert (after.name, after.step, after.model.size) == ("tiny", 70, TINY)
    assert modelfile.fingerprint(after.model) == modelfile.fingerprint(before.model)
    assert after.about["licence"] == "CC0-1.0"
    assert json.loads(after.about["inputs"])["teacher"]["sha256"] == "abc123"
    assert json.loads(after.about["scores"])["shards"]["test_a"]["tiny"]["pesq_wb"]["mean"] == 2.5
    assert "steps: 90" in after.about["config"]
    assert "secret" not in str(after.about)
    config = yaml.safe_load(after.about["config"])
    assert config["data"] == {"train": "{en,de}", "valid": "s3://ours/valid", "segment_seconds": 4.0}
    assert (config["teacher"]["file"], config["runs"]) == ("b.pth", "runs")
    named = [(one["name"], one["manifest_sha256"]) for one in json.loads(after.about["inputs"])["data"]]
    assert named == [("train", "11"), ("train", "22"), ("s3://ours/valid", "33")]
    described = {one.key: one.value for one in onnx.load(exported / "tiny.onnx").metadata_props}
    assert described == {**after.about, "name": "tiny", "sample_rate": "16000"}


def test_an_exported_file_enhances_teaches_and_is_exported_again(run, exported, clips, tmp_path):
    noisy, rate = soundfile.read(clips / "noisy" / "0.wav", dtype="float32")
    expected = mvat_dist.load(run).enhance(noisy, rate)
    np.testing.assert_array_equal(
        mvat_dist.load(exported / "tiny.safetensors").enhance(noisy, rate), expected
    )
    half = mvat_dist.load(exported / "tiny.fp16.safetensors").enhance(noisy, rate)
    assert 0 < np.abs(half - expected).max() < 0.01 * np.abs(expected).max()
    teacher = LiveTeacher(exported / "tiny.safetensors", torch.device("cpu"), "fp32")
    assert teacher.describe()["sha256"] == modelfile.fingerprint(modelfile.load(resolve(run)).model)
    again = ["--formats", "safetensors", "--data", str(clips), "--out", str(tmp_path)]
    main(["--model", str(exported / "tiny.safetensors"), *again])
    first, second = (modelfile.load(folder / "tiny.safetensors") for folder in (exported, tmp_path))
    assert first.about == second.about


def test_onnxruntime_alone_enhances_a_file_as_the_command_does(run, exported, tmp_path):
    clean = syllables(20.0)  # longer than a window
    stereo = np.stack([clean + noise_at(clean, 5.0, seed=at) for at in range(2)], axis=1)
    soundfile.write(tmp_path / "long.flac", stereo, 22050)
    example = REPOSITORY / "docs" / "examples" / "enhance_onnx.py"
    program = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['mvat_dist'] = None; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", program, example, exported / "tiny.onnx", "long.flac", "enhanced.flac"]
    subprocess.run(command, check=True, cwd=tmp_path)
    noisy, rate = soundfile.read(tmp_path / "long.flac", dtype="float32")
    found = soundfile.read(tmp_path / "enhanced.flac", dtype="float32")[0]
    expected = mvat_dist.load(run).enhance(noisy, rate)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 / 32768)


@pytest.mark.parametrize(
    ("formats", "there"),
    [
        (
            "fp16",
            ['load("tiny.fp16.safetensors")', "--model tiny.fp16.safetensors", "metadata of `tiny.fp16"],
        ),
        ("torchscript", ["`tiny.pt` map float32"]),
        (
            "onnx,torchscript",
            ["`tiny.onnx` and `tiny.pt` map", "repository of mvat_dist", "metadata of `tiny.onnx`"],
        ),
    ],
)
def test_a_card_tells_how_to_use_the_files_that_are_there(run, clips, tmp_path, formats, there):
    main(["--model", str(run), "--formats", formats, "--data", str(clips), "--out", str(tmp_path)])
    card = (tmp_path / "tiny.md").read_text()
    for words in there:
        assert words in card
    named = set(re.findall(r"tiny[\w.]*\.(?:safetensors|pt|onnx)", card))
    assert named == {file.name for file in tmp_path.iterdir()} - {"tiny.md"}
    assert ("mvat_dist.load" in card) == ("fp16" in formats)


# --- what is not kept -----------------------------------------------------------------------------


def test_a_file_that_differs_is_not_kept(run, clips, tmp_path, monkeypatch, capsys):
    def shifted(model: Manner) -> torch.jit.ScriptModule:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.manner_block.out_conv[0].bias += 0.01
        return honest(other)

    honest = graph.traced
    monkeypatch.setattr(graph, "traced", shifted)
    options = ["--formats", "torchscript,safetensors", "--data", str(clips), "--out", str(tmp_path)]
    assert exit_code(main, ["--model", str(run), *options]) == 2
    captured = capsys.readouterr()
    assert "tiny.pt: NOT KEPT, differs by at most" in captured.out
    assert captured.err.splitlines()[-1] == "error: not kept: tiny.pt"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.md", "tiny.safetensors"]
    assert "tiny.pt (not kept)" in (tmp_path / "tiny.md").read_text()


def test_without_the_extra_the_other_formats_are_written(run, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    options = ["--formats", "onnx,fp16", "--data", str(clips), "--out", str(tmp_path)]
    assert exit_code(main, ["--model", str(run), *options]) == 2
    assert "needs the package onnx: pip install 'mvat_dist[export]'" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.fp16.safetensors", "tiny.md"]


def test_a_damaged_description_is_named(exported, tmp_path):
    file = tmp_path / "torn.safetensors"
    weights = safetensors.torch.load_file(exported / "tiny.safetensors")
    for size in ("{}", "[1]", "no JSON", '{"kind": "small", "hidden": 0}'):
        safetensors.torch.save_file(weights, file, {"format": metadata.FORMAT, "name": "a", "size": size})
        with pytest.raises(UserError, match=r"torn\.safetensors: its description is damaged"):
            modelfile.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "no model at"),
        ({"--model": "notes.txt"}, "notes.txt"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--formats": "onxx"}, "did you mean 'onnx'"),
        ({"--clips": "0"}, "--clips is 0"),
        ({"--out": "notes.txt"}, "cannot make the folder"),
    ],
)
def test_mistakes_are_one_line(run, clips, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("nothing")
    given = {"--model": str(run), "--data": str(clips), "--out": "out", **change}
    argv = [part for option in given.items() for part in option]
    assert_refused(main, argv, message, capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_every_format_has_a_suffix_of_its_own():
    assert len({kind.suffix for kind in export.FORMATS.values()}) == len(export.FORMATS)
