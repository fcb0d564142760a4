"""The teacher cache: learning from it equals learning live; filling it is the same however it is done."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from mvat_dist import cache
from mvat_dist.data.shards.target_codec import map_name, unit_step
from mvat_dist.data.shards.targets import TeacherCache
from mvat_dist.errors import UserError
from mvat_dist.losses.mvat import energy_map
from mvat_dist.models import weights
from mvat_dist.training import cache_check
from mvat_dist.training.cache_check import Times
from tests.cache_corpus import (
    UTTERANCES,
    VARIANTS,
    compact,  # noqa: F401 (a fixture, as the next ones)
    content,
    corpus,  # noqa: F401
    exact,  # noqa: F401
    from_cache,
    opened,
    options,
    teacher,  # noqa: F401
)
from tests.commands.test_train import environment, history, train
from tests.waiting import until

# ruff: noqa: F811 (fixtures are imported and then asked for by name)


def test_every_map_of_every_segment(corpus: Path, teacher: Path, exact: Path) -> None:
    """Against the network itself, one segment at a time."""
    cached = TeacherCache(exact)
    data = opened(corpus)
    network = weights.load(teacher).model.eval()
    assert len(cached) == VARIANTS * UTTERANCES == data.segments_per_corpus
    keys = list(cached.size.views(4000))
    cached.select(keys, output=True)
    for number in range(len(cached)):
        noisy = data.segment(number).noisy
        stored = cached.read(number, noisy)
        with torch.no_grad():
            output, views = network(torch.from_numpy(noisy)[None], return_views=True)
        np.testing.assert_allclose(stored.output, output[0].numpy(), rtol=0, atol=1e-6)
        for key in keys:
            expected = energy_map(views[key])[0].numpy()
            np.testing.assert_allclose(
                stored.maps[key], expected, rtol=0, atol=1e-6 * np.linalg.norm(expected)
            )


def test_same_keys_in_the_same_order_beside_the_audio(corpus: Path, compact: Path) -> None:
    """As plain webdataset and tar see both."""
    for audio in sorted((corpus / "train_clean").glob("audio-*.tar")):
        targets = compact / audio.name.replace("audio", "teacher")
        keys = [
            [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
            for path in (audio, targets)
        ]
        assert keys[0] == keys[1]
        with tarfile.open(targets) as tar:
            assert len(tar.getnames()) == VARIANTS * len(keys[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cached runs")


def learn(corpus: Path, runs: Path, name: str, *arguments: str, processes: int = 1) -> Path:
    fixed = (f"--data.variants={VARIANTS}", "--data.tempo_probability=0.2", "--distil.method=mvat+output")
    more = ("--student=tiny,mini", "--train.steps=10", *fixed, *arguments)
    return train(corpus, runs, name, *more, processes=processes)


@pytest.fixture(scope="module")
def live(corpus: Path, runs: Path, teacher: Path) -> Path:
    return learn(corpus, runs, "live", f"--teacher={teacher}")


def terms(run: Path, student: str) -> dict[str, np.ndarray]:
    rows = [row for row in history(run, student) if "loss" in row]
    names = [name for name in rows[0] if name in ("loss", "enhance", "output") or name.startswith("mvat")]
    return {name: np.array([row[name] for row in rows]) for name in names}


def test_learning_from_an_exact_cache_is_learning_live(
    corpus: Path, runs: Path, exact: Path, live: Path, teacher: Path
) -> None:
    """fp32: every term of every step, and with two ranks too; the teacher's file may be named or not."""
    alone = learn(corpus, runs, "exact", *from_cache(exact), f"--teacher={teacher}")
    shared = learn(corpus, runs, "shared", *from_cache(exact), processes=2)
    for student in ("tiny", "mini"):
        expected = terms(live, student)
        assert len(expected["loss"]) == 10
        for name, values in terms(alone, student).items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6)
        # The first step; later ones differ by BatchNorm's running statistics of two ranks alone.
        for name, values in terms(shared, student).items():
            np.testing.assert_allclose(values[0], expected[name][0], rtol=1e-5, atol=1e-5)


def test_learning_from_a_compact_cache_has_the_same_curve(
    corpus: Path, runs: Path, compact: Path, live: Path
) -> None:
    """The bounds that the documentation states: for equal weights, which both have at the first step, that of
    the rounding (closed form); over the run 1 % of the loss."""
    small = learn(corpus, runs, "compact", *from_cache(compact))
    frames = {map_name(key): count for key, count in TeacherCache(compact).size.views(4000).items()}
    step = unit_step(max(frames.values()))
    for student in ("tiny", "mini"):
        expected, found = terms(live, student), terms(small, student)
        for name in (name for name in found if name.count("/") == 3):
            rounding = step * np.sqrt(frames[name.removeprefix("mvat/")]) / 2
            bound = rounding * (2 * np.sqrt(expected[name][0]) + rounding)
            assert abs(found[name][0] - expected[name][0]) <= bound
        assert found["mvat"][0] != expected["mvat"][0]
        assert found["enhance"][0] == expected["enhance"][0]
        assert found["output"][0] == pytest.approx(expected["output"][0], rel=1e-3)
        assert found["loss"].mean() == pytest.approx(expected["loss"].mean(), rel=0.01)


def test_killed_and_started_again_it_is_the_same(
    corpus: Path, teacher: Path, compact: Path, tmp_path: Path
) -> None:
    """kill -9 as soon as one shard is there, and again after two; parts side by side finish it."""
    out, parts = tmp_path / "torn cache", "teacher-*.npy"
    command = [sys.executable, "-m", "mvat_dist.cache", *options(corpus, teacher, out, "--output")]
    for shards in (1, 2):
        with subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as one:
            until(
                lambda n=shards, one=one: one.poll() is not None or len(list(out.glob(parts))) >= n,
                120,
                pause=0.001,
            )
            one.send_signal(signal.SIGKILL)
    if not (out / "teacher.json").exists():
        with pytest.raises(UserError, match="not a finished teacher cache"):
            TeacherCache(out)
    for part in ("0/2", "1/2"):
        cache.main(options(corpus, teacher, out, "--output", f"--part={part}"))
    assert content(out) == content(compact)
    again = content(out)
    cache.main(options(corpus, teacher, out, "--output"))
    assert content(out) == again


def test_several_processes_write_the_same_shards(
    corpus: Path, teacher: Path, compact: Path, tmp_path: Path
) -> None:
    more = options(corpus, teacher, tmp_path / "cache", "--output", "--workers=2")
    subprocess.run([sys.executable, "-m", "mvat_dist.cache", *more], env=environment(), check=True)
    assert content(tmp_path / "cache") == content(compact)


def test_a_grid_of_pairs(
    corpus: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [
        "--data.mode=premixed",
        "--data.stride_seconds=0.2",
        "--data.tempo_probability=0",
        "--data.variants=0",
    ]
    out = tmp_path / "grid"
    cache.main(options(corpus, teacher, out, *grid))
    # Of 0.2, 0.4, ... 1.0 s in steps of 0.2 s, a segment being 0.25 s long: 1 + 2 + 3 + 4 + 5 places.
    assert len(TeacherCache(out)) == 15
    cache.main(options(corpus, teacher, out, *grid, "--verify"))
    assert "15 segments" in capsys.readouterr().out


def test_a_dry_run_explains_the_choice(
    corpus: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--sizes={tiny: {kind: base, hidden: 6, depth: 2}}"
    cache.main(options(corpus, teacher, tmp_path / "none", "--dry-run", sizes, "--student=tiny"))
    said = capsys.readouterr().out
    assert "MB per hour of audio" in said
    assert "seconds per step" in said
    assert "epochs" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("variants", [1, 4])
def test_when_a_cache_pays(variants: int) -> None:
    """Counted: the first epoch at which filling and reading took no more than asking each time."""
    times = Times(teacher=1.0, write=0.25, read=0.125, students=3.0)
    filling = variants * (times.teacher + times.write)
    epochs = np.arange(0, 20, 1e-3)
    pays = epochs[filling + epochs * times.read <= epochs * times.teacher + 1e-9]
    assert cache_check.break_even(times, variants) == pytest.approx(pays[0], abs=2e-3)
    assert cache_check.break_even(times._replace(read=2.0), variants) == np.inf
