"""Write the model card of an export: the network, its origin, its scores, its use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import yaml
from tabulate import tabulate

from mvat_dist.config import sizes
from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.config.sizes import COST_SECONDS
from mvat_dist.evaluation import table
from mvat_dist.evaluation.statistics import Statistics
from mvat_dist.inference import provenance
from mvat_dist.io import parse_record
from mvat_dist.models.weights import LoadedModel


@dataclass(frozen=True)
class Exported:
    """One file of an export, or the reason why it was not kept."""

    file: str
    kind: str
    bytes: int
    check: str
    """Its difference from the network, or the reason of its refusal."""
    kept: bool = True


_USE = """\
```python
import mvat_dist, soundfile
audio, rate = soundfile.read("noisy.wav")
enhanced = mvat_dist.load("{weights}").enhance(audio, rate)
```

or `python -m mvat_dist.enhance --model {weights} noisy.wav --out enhanced`."""

_USE_GRAPH = """\
{graphs} map float32 (batch, time) at 16 kHz, full scale 1, to the same shape, for any batch and time;
normalisation and padding are inside."""

_USE_ONNX = "`docs/examples/enhance_onnx.py` in the repository of mvat_dist runs `{onnx}` without torch."

_LIMITS = """\
- 16 kHz mono inside: nothing above 8 kHz is left, and channels are enhanced one by one.
- Not for live streams: it normalises by, and attends over, its whole input. Long recordings are cut into
  windows.
- Speech in noises, rooms and languages unlike its training data may be damaged. Music is not speech."""


def card(loaded: LoadedModel, about: Mapping[str, str], exported: Sequence[Exported]) -> str:
    """The model card of `loaded` as Markdown."""
    size = loaded.model.size
    gmac = sizes.macs(size, round(COST_SECONDS * SAMPLE_RATE)) / 1e9
    facts = [
        ("network", f"MANNER (arXiv 2203.02181), {', '.join(f'{k} {v}' for k, v in asdict(size).items())}"),
        ("parameters", f"{sizes.parameters(size):,}"),
        (f"GMAC at {COST_SECONDS:g} s", f"{gmac:.2f}"),
        ("steps of training", "unknown" if loaded.step is None else f"{loaded.step:,}"),
        ("weights", f"SHA-256 {about['sha256']}"),
        ("licence", about["licence"]),
        ("exported with", about["exported_with"]),
    ]
    kept = [file.file for file in exported if file.kept]
    files = [
        (
            f"`{file.file}`" if file.kept else f"{file.file} (not kept)",
            file.kind,
            f"{file.bytes / 1e6:.2f}" if file.kept else "-",
            file.check,
        )
        for file in exported
    ]
    return "\n\n".join(
        [
            f"# {loaded.name}",
            "Speech enhancement: noisy speech in, the estimate of the clean speech out.",
            tabulate(facts, ["", ""], tablefmt="github", disable_numparse=True),
            "## Files",
            tabulate(files, ["file", "what", "MB", "checked"], tablefmt="github", disable_numparse=True),
            "## Use",
            *_use(kept),
            "## Training",
            _legible(lambda: _training(about, kept)),
            "## Scores",
            _legible(lambda: _scores(about)),
            "## Limits",
            _LIMITS,
        ]
    ) + "\n"  # fmt: skip


def _use(kept: Sequence[str]) -> list[str]:
    """Say how to use the files that were kept."""
    weights = [file for file in kept if file.endswith(".safetensors")]
    onnx = [file for file in kept if file.endswith(".onnx")]
    graphs = [f"`{file}`" for file in kept if file not in weights]
    paragraphs = [_USE.format(weights=weights[0])] if weights else []
    if graphs:
        paragraphs.append(_USE_GRAPH.format(graphs=" and ".join(graphs)))
    if onnx:
        paragraphs.append(_USE_ONNX.format(onnx=onnx[0]))
    return paragraphs or ["No file was kept."]


def _legible(section: Callable[[], str], subject: str = "it") -> str:
    """A section of the card, or a sentence in its place if the exported file's metadata are damaged."""
    try:
        return section()
    except provenance.DAMAGE:
        return f"What the file that was exported says of {subject} cannot be read."


def _training(about: Mapping[str, str], kept: Sequence[str]) -> str:
    if "config" not in about:
        return "The file that was exported does not say."
    inputs = provenance.read(about, "inputs") or {}
    method, *data = provenance.training(yaml.safe_load(about["config"]))
    lines = [method]
    if teacher := inputs.get("teacher"):
        lines.append(provenance.origin("teacher", teacher))
    if began := inputs.get("init"):
        lines.append(provenance.origin("began as", began))
    lines.extend(data)
    if environment := provenance.read(about, "environment"):
        lines.append(f"mvat_dist at commit {environment['commit']}")
    listed = "\n".join(f"- {line}" for line in lines)
    # TorchScript files have no metadata on their training.
    described = [f"`{file}`" for file in kept if not file.endswith(".pt")]
    if not described:
        return listed
    return f"{listed}\n\nThe whole configuration is in the metadata of {' and '.join(described)}."


def _scores(about: Mapping[str, str]) -> str:
    scores = provenance.read(about, "scores")
    if not scores:
        return "Not evaluated yet: `python -m mvat_dist.evaluate RUN --data DATA`, then export again."
    blocks = [_legible(partial(_tables, data, sections), data) for data, sections in scores.items()]
    note = (
        "Higher is better, the best of a column is bold; 95 % bootstrap intervals over clips in brackets, of "
        "two clips or more."
    )
    return "\n\n".join([*blocks, note])


def _tables(data: str, sections: Mapping[str, Any]) -> str:
    """One table per section; a damaged section does not hide the others."""
    titles = {f"{section} of {data}": by_model for section, by_model in sections.items()}
    return "\n\n".join(
        _legible(partial(_table, title, by_model), title) for title, by_model in titles.items()
    )


def _table(title: str, by_model: Mapping[str, Any]) -> str:
    scores = parse_record(json.dumps(by_model), dict[str, dict[str, Statistics]], title)
    return f"{title}\n\n{table.score_table(scores)}"
