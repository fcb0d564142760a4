"""Export a trained network: safetensors, TorchScript and ONNX files, each checked before it is kept."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from mvat_dist.config.cli import CommandParser
from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.clips import Clip, UnusableClipError
from mvat_dist.data.prepare.inspection import SILENCE
from mvat_dist.data.test_sets import held_out
from mvat_dist.errors import UserError, exit_code, nearest
from mvat_dist.evaluation.scorer import Pair, score_pairs
from mvat_dist.evaluation.statistics import mean_interval
from mvat_dist.inference import export as exporting
from mvat_dist.inference import leftovers, provenance
from mvat_dist.inference.endings import clean_end
from mvat_dist.inference.export import Run, largest_error, probes, run_torch
from mvat_dist.inference.model_card import Exported, card
from mvat_dist.io import atomic_file, fsync, make_folder, scratch_directory, write_text
from mvat_dist.models import weights as modelfile
from mvat_dist.models.weights import LoadedModel
from mvat_dist.runs import weights as weightsfile

FP32_BOUND = 1e-4
"""Largest difference from the network, relative to the peak of its output: -80 dB."""
FP16_BOUND = 1e-2
"""For weights with 11 bits."""

WORTH_IT = 0.95
"""Share of the time, or of the size, of fp32 that 8 bits may have at most: less of a gain is none."""
SCORED_CLIPS = 2
"""Fewest that the cost of 8 bits is taken from: one has no interval."""
TIMED_PASSES = 11
"""Pairs of them, for a median."""

CLIP_SECONDS = 10.0
"""Longest clip to check on."""


@dataclass(frozen=True)
class Subject:
    """What is exported, and on what it is checked."""

    loaded: LoadedModel
    about: Mapping[str, str]
    clips: Sequence[Clip]
    max_loss: float
    """PESQ-WB that 8 bits may cost."""

    def difference(self, exported: Run, bound: float) -> str:
        """How far an exported file is from the network, in words.

        Raises:
            UserError: further than `bound`.
        """
        found = largest_error(
            exported, run_torch(self.loaded.model), probes([clip.noisy for clip in self.clips])
        )
        said = f"differs by at most {found:.1e} of the output's peak"
        if found > bound:
            raise UserError(f"{said}, more than {bound:g}")
        return f"{said} (bound {bound:g})"


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    suffix: str
    kind: str
    make: Callable[[Subject, Path], str]
    """Writes a file, compares what is read from it with the network, and says how they differ.

    Raises `UserError` where that is too much.
    """


def _safetensors(subject: Subject, file: Path) -> str:
    return _weights(subject, file, torch.float32, 0.0)


def _fp16(subject: Subject, file: Path) -> str:
    return _weights(subject, file, torch.float16, FP16_BOUND)


def _weights(subject: Subject, file: Path, dtype: torch.dtype, bound: float) -> str:
    loaded = subject.loaded
    # Not BatchNorm's statistics: variances go beyond the range of 16 bits, and are few.
    lesser = {name: value.detach().to(dtype) for name, value in loaded.model.named_parameters()}
    weights = loaded.model.state_dict() | lesser
    size, about = loaded.model.size, subject.about
    modelfile.save(file, weights, name=loaded.name, size=size, step=loaded.step, about=about)
    return subject.difference(run_torch(modelfile.load(file).model), bound)


def _torchscript(subject: Subject, file: Path) -> str:
    exporting.save(subject.loaded.model, file, subject.about["sha256"])
    return subject.difference(exporting.runner(file), FP32_BOUND)


def _onnx(subject: Subject, file: Path) -> str:
    onnx_file = _onnxfile()
    onnx_file.save(subject.loaded.model, file, _onnx_about(subject))
    return subject.difference(onnx_file.runner(file), FP32_BOUND)


def _int8(subject: Subject, file: Path) -> str:
    """Ranges of the activations from every second clip, the cost from the others."""
    onnx_file = _onnxfile()
    if len(subject.clips[1::2]) < SCORED_CLIPS:
        raise UserError(
            f"8 bits need at least {2 * SCORED_CLIPS} clips, every second one for ranges and the others to "
            f"score, and there are {len(subject.clips)}: give more with --clips and --data"
        )
    full = file.with_suffix(".fp32.onnx")
    onnx_file.save(subject.loaded.model, full, {})
    onnx_file.save_int8(full, file, [clip.noisy for clip in subject.clips[::2]], _onnx_about(subject))
    runs, scored = (onnx_file.runner(full), onnx_file.runner(file)), subject.clips[1::2]
    fp32, int8 = _pesq(runs, scored)
    cost, low, high = mean_interval((fp32 - int8).tolist())  # of the same clips for both: paired
    time_share = _time_share(runs[1], runs[0], scored[0])
    size_share = file.stat().st_size / full.stat().st_size
    said = (
        f"PESQ-WB {fp32.mean():.3f} -> {int8.mean():.3f}, a cost of {cost:.3f} [{low:.3f}, {high:.3f}] on "
        f"{fp32.size} clips (95 %, paired), {time_share:.2f} times the time of fp32, {size_share:.2f} times "
        "the size"
    )
    if not cost <= subject.max_loss:
        raise UserError(f"{said}: costs more than --max-pesq-loss {subject.max_loss:g}")
    if min(time_share, size_share) > WORTH_IT:
        raise UserError(f"{said}: neither faster nor smaller by {1 - WORTH_IT:.0%}")
    return said


FORMATS = {
    "safetensors": Format(".safetensors", "weights, fp32, with origin and scores", _safetensors),
    "fp16": Format(".fp16.safetensors", "weights, fp16", _fp16),
    "torchscript": Format(".pt", "TorchScript, BatchNorm folded", _torchscript),
    "onnx": Format(".onnx", "ONNX, BatchNorm folded", _onnx),
    "int8": Format(".int8.onnx", "ONNX, 8-bit weights and activations", _int8),
}
DEFAULT_FORMATS = "safetensors,fp16,torchscript,onnx"


def _onnxfile() -> ModuleType:
    try:
        from mvat_dist.inference import onnx_file
    except ModuleNotFoundError as error:
        raise UserError(f"needs the package {error.name}: pip install 'mvat_dist[export]'") from error
    return onnx_file


def _onnx_about(subject: Subject) -> dict[str, str]:
    """Metadata of an ONNX file, which has no other place for the name and the rate."""
    own = {"name": subject.loaded.name, "sample_rate": str(SAMPLE_RATE)}
    return {**subject.about, **own}


def _pesq(runs: Sequence[Run], clips: Sequence[Clip]) -> npt.NDArray[np.float64]:
    """PESQ-WB of each of `runs` (rows), for the clips that have it for all of them (columns).

    Raises:
        UserError: fewer than `SCORED_CLIPS` have.
    """
    estimates = [[run(clip.noisy[None])[0] for clip in clips] for run in runs]
    pairs = [Pair(one, clip.clean) for several in estimates for one, clip in zip(several, clips, strict=True)]
    scores = [one["pesq_wb"].value for one in score_pairs(pairs, ["pesq_wb"])]
    table = np.array(scores, dtype=np.float64).reshape(len(runs), len(clips))
    valid = table[:, np.isfinite(table).all(axis=0)]
    if valid.shape[1] < SCORED_CLIPS:
        raise UserError(
            f"PESQ has a score for {valid.shape[1]} of {len(clips)} clips, and 8 bits need at least "
            f"{SCORED_CLIPS}: give others with --data"
        )
    return valid


def _time_share(run: Run, reference: Run, clip: Clip) -> float:
    """Time of `run` over that of `reference`: median over pairs of passes, as a busy moment slows both."""

    def seconds(which: Run) -> float:
        started = time.perf_counter()
        which(clip.noisy[None])
        return time.perf_counter() - started

    return float(np.median([seconds(run) / seconds(reference) for _ in range(TIMED_PASSES)]))


def export(subject: Subject, names: Sequence[str], out: Path) -> list[Exported]:
    """Write the formats called `names`, and the card, into `out`; those that fail their check are not kept.

    Of a format that is not kept, the file of an earlier export goes too. Nothing in `out` changes before
    all is made, the card included.

    Raises:
        UserError: a folder is in the place of a file.
    """
    places = [out / (subject.loaded.name + FORMATS[name].suffix) for name in names]
    card_place = out / f"{subject.loaded.name}.md"
    if taken := [str(place) for place in (*places, card_place) if place.is_dir()]:
        raise UserError(f"a folder is in the place of {', '.join(taken)}: move it, or choose another --out")
    make_folder(out)
    with scratch_directory(out, "export") as staged:
        made = [_made(subject, FORMATS[name], staged) for name in tqdm(names, unit="file", desc="exporting")]
        text = card(subject.loaded, subject.about, made)
        for one in made:
            if one.kept:
                (staged / one.file).replace(out / one.file)
            else:
                (out / one.file).unlink(missing_ok=True)
        fsync(out)
    write_text(card_place, text)
    return made


def _made(subject: Subject, one: Format, folder: Path) -> Exported:
    """Write one file into `folder`, where it passes its check."""
    target = folder / (subject.loaded.name + one.suffix)
    try:
        with atomic_file(target) as temporary, scratch_directory(folder, "making") as making:
            # Under its own name, by whose ending it is read, in a folder that goes with a failure.
            file = making / target.name
            check = one.make(subject, file)
            size = file.stat().st_size
            file.replace(temporary)
        return Exported(target.name, one.kind, size, check)
    except UserError as refusal:
        return Exported(target.name, one.kind, 0, str(refusal), kept=False)


def _name_leftovers(subject: Subject, names: Sequence[str], out: Path) -> None:
    """Say which files of earlier exports, of formats not in `names`, hold other weights."""
    for file in (
        out / (subject.loaded.name + one.suffix) for key, one in FORMATS.items() if key not in names
    ):
        if file.is_file() and (sha256 := leftovers.sha256_of(file)) != subject.about["sha256"]:
            of = (
                f"is of other weights (SHA-256 {sha256})" if sha256 else "does not say of which weights it is"
            )
            print(f"note: {file}, of an earlier export, {of}: remove it or export it again", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m mvat_dist.export",
        "Export a trained network: each file is compared with the network on real clips before it is kept,\n"
        "and a model card is written beside the files.",
        "python -m mvat_dist.export --model runs/NAME/students/manner-s-2.0gf --data shards/dns \\\n"
        "      --out release --licence CC-BY-4.0",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a run, a student's folder in one, or a model file")
    add(
        "--out",
        type=Path,
        required=True,
        help="folder for the files; those of an earlier export are replaced",
    )
    add("--data", required=True, help="noisy and clean clips to check on, as for mvat_dist.evaluate")
    add("--clips", type=int, default=8, help="how many of them (default: %(default)s)")
    formats = f"of {', '.join(FORMATS)} (default: %(default)s)"
    add("--formats", default=DEFAULT_FORMATS, help=formats)
    add("--weights", choices=("best", "last"), default="best", help="which weights (default: %(default)s)")
    add("--licence", default="", help="licence of the weights, in words (default: not stated)")
    loss = "PESQ-WB that int8 may cost, else it is not kept (default: %(default)s)"
    add("--max-pesq-loss", type=float, default=0.05, help=loss)
    return parser


def _formats(text: str) -> list[str]:
    names = [one.strip() for one in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--formats: unknown format {name!r}; did you mean {nearest(name, FORMATS)}?")
    return list(dict.fromkeys(names))


def _clips(data: str, count: int) -> list[Clip]:
    """The first clips of `data` that something can be checked on; the others are named.

    Raises:
        UserError: there is none.
    """
    found: list[Clip] = []
    for clips, index in (
        (its, at) for its in held_out(data, count, CLIP_SECONDS).values() for at in range(len(its))
    ):
        if len(found) == count:
            break
        try:
            clip = clips[index]
        except UnusableClipError as error:
            print(f"note: clip {error.key} is left out: {error}", file=sys.stderr)
            continue
        # What maps silence to silence may map speech to anything.
        if not clip.noisy.size or np.abs(clip.noisy - clip.noisy.mean()).max() < SILENCE:
            print(f"note: clip {clip.key} is left out: it is silent", file=sys.stderr)
            continue
        found.append(clip)
    if not found:
        raise UserError(f"--data {data} has no clip to check on that can be read and is not silent")
    return found


def main(argv: list[str] | None = None) -> None:
    """Export one network and say what was kept."""
    arguments = _parser().parse_args(argv)
    names = _formats(arguments.formats)
    if arguments.clips < 1:
        raise UserError(f"--clips is {arguments.clips}: at least one is needed to check on")
    file = weightsfile.resolve(arguments.model, arguments.weights)
    loaded = modelfile.load(file)
    clips = _clips(arguments.data, arguments.clips)
    about = provenance.describe(file, loaded, arguments.licence)
    subject = Subject(loaded, about, clips, arguments.max_pesq_loss)
    with clean_end():
        made = export(subject, names, arguments.out)
    for one in made:
        kept = f"{one.bytes / 1e6:.2f} MB" if one.kept else "NOT KEPT"
        print(f"{one.file}: {kept}, {one.check}")
    print(f"model card: {arguments.out / loaded.name}.md")
    _name_leftovers(subject, names, arguments.out)
    if refused := [one.file for one in made if not one.kept]:
        raise UserError(f"not kept: {', '.join(refused)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
