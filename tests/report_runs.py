"""Run folders as training and evaluation leave them, with scores drawn from a known model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mvat_dist.config import parser
from mvat_dist.config import sizes as students
from mvat_dist.config.schema import Config
from mvat_dist.evaluation.statistics import Row
from mvat_dist.io import write_json
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History

TEACHER = {"file": "/teachers/t.safetensors", "name": "tiny-teacher", "sha256": "ab" * 32}
GAINS = {"none": 0.5, "output": 0.55, "mvat": 0.6, "mvat+output": 0.62}
"""PESQ above the noisy input by method, before what size, view and seed add."""


def config_of(method: str, seed: int, *more: str) -> Config:
    """A short run of two students on the command line's own terms."""
    options = ["--student", "manner-s-0.6gf,manner-s-2.0gf", "--distil.method", method, "--seed", str(seed)]
    options += ["--train.steps", "40", "--data.train", "/shards/dns", "--engine.device", "cpu"]
    options += [] if method == "none" else ["--teacher.file", TEACHER["file"]]
    return parser.parse([*options, *more])


def make_run(
    folder: Path, config: Config, *, clips: int = 40, subset: str = "test_a", gain: float | None = None
) -> RunDir:
    """A finished run with its records, an evaluation and an example.

    `gain` takes the place of the method's own in `GAINS`.
    """
    run = RunDir(folder)
    run.create(config)
    taught = config.distil.method != "none"
    write_json(run.inputs, {"teacher": TEACHER if taught else None, "data": {}})
    run.write_status("finished", config.train.steps)
    packages = {"torch": "2.13.0+cpu", "mvat_dist": "0.1.0"}
    write_json(
        run.environment,
        {"host": "here", "commit": "c0ffee", "packages": packages, "ranks": {"world_size": 2}},
    )
    for name in students.select(config.student, config.sizes):
        write_history(run, name, config)
        write_sound(run.student(name) / "examples" / "00.flac", 1 + config.seed)
    for kind in ("noisy", "clean", *(["teacher"] if taught else [])):
        write_sound(run.path / "examples" / "00" / f"{kind}.flac", 9)
    write_json(run.path / "examples" / "examples.json", {"keys": ["valid_0"], "seconds": 1.0})
    write_evaluation(run, config, score_rows(config, clips, subset, gain))
    return run


def write_history(run: RunDir, name: str, config: Config) -> None:
    """Rows every 10 steps at 8 seconds of audio per second, a validation every 20."""
    run.student(name).mkdir(parents=True, exist_ok=True)
    history = History(run.history(name))
    for step in range(10, config.train.steps + 1, 10):
        history.append({"step": step, "enhance": 1 / step, "audio_seconds_per_second": 8.0})
        if step % 20 == 0:
            history.append({"step": step, "valid/pesq_wb": 1.2 + step / 100 + config.seed / 50})


def write_sound(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, 0.1 * np.random.default_rng(seed).standard_normal(16000), 16000)


def score_rows(config: Config, clips: int, subset: str, gain: float | None) -> list[Row]:
    """Noisy input, teacher and students on the same clips; every clip has all scores."""
    betas = config.distil.view_betas.values()
    if gain is None:
        gain = GAINS[config.distil.method] - 0.03 * sum(not beta for beta in betas)
    names = list(students.select(config.student, config.sizes))
    models = {name: gain + 0.1 * place for place, name in enumerate(names)}
    models = {"noisy": 0.0, **({"teacher": 0.9} if config.distil.method != "none" else {}), **models}
    rows = []
    for index in range(clips):
        base = np.random.default_rng(index)
        snr, hard = float(base.uniform(-5, 20)), float(base.normal(0, 0.2))
        for place, (model, above) in enumerate(models.items()):
            luck = np.random.default_rng([index, place, config.seed, len(config.distil.method)])
            pesq = 1.3 + 0.03 * snr + hard + above + float(luck.normal(0, 0.05)) * (model in names)
            rows.append(
                {
                    "subset": subset,
                    "index": index,
                    "key": f"clip_{index:03d}",
                    "duration_s": 3.0,
                    "snr_db": round(snr, 2),
                    "model": model,
                    "pesq_wb": pesq,
                    "stoi": 0.7 + pesq / 20,
                    "si_sdr": snr + 10 * above,
                    "failure": None,
                }
            )
    return rows


def write_evaluation(run: RunDir, config: Config, rows: list[Row], name: str = "dns-best") -> None:
    """``rows.jsonl``, and of ``scores.json`` what a report reads, in the words of `mvat_dist.evaluate`."""
    out = run.path / "evaluate" / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {**students.select(config.student, config.sizes), "teacher": students.get("manner-b")}
    networks: dict[str, Any] = {
        model: {
            "name": model,
            "parameters": students.parameters(sizes[model]),
            "gmac_at_4_s": students.macs(sizes[model], 64_000) / 1e9,
            "real_time_factor": students.macs(sizes[model], 64_000) / 1e11,
        }
        for model in dict.fromkeys(row["model"] for row in rows)
        if model != "noisy"
    }
    record = {"run": str(run.path), "data": "/shards/dns", "weights": "best", "machine": "here"}
    write_json(
        out / "scores.json",
        {**record, "time": "2026-11-22T20:15:00+0100", "networks": networks},
    )
