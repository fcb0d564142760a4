"""Enhance recordings of any rate, channels, length and format with a trained network."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from tqdm import tqdm

from mvat_dist.config.cli import CommandParser
from mvat_dist.errors import UserError, clean_end, exit_code
from mvat_dist.inference import enhancer
from mvat_dist.inference.audio_files import Job, check_writable, duration, plan, remove_abandoned
from mvat_dist.inference.enhancer import BLOCK, Enhancer
from mvat_dist.inference.many_files import Result, enhance_in_parallel, enhance_one_by_one
from mvat_dist.inference.overlap_add import Audio
from mvat_dist.io import make_folder

STANDARD = Path("-")
"""Standard input and output."""

_UNIT = " s of audio"
_BAR = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}{unit} [{remaining} left, {rate_noinv_fmt}]"
_BAR_WITHOUT_END = "{n:.0f}{unit} [{elapsed}, {rate_noinv_fmt}]"
_CONTAINERS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b"ID3\x03", b"ID3\x04")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m mvat_dist.enhance",
        "Enhance recordings. Rate, channels, length, level and format stay as they are, and memory does not\n"
        "grow with the length. The networks work at 16 kHz: nothing above 8 kHz is left, except what --dry\n"
        "keeps. Channels are enhanced one by one.",
        "python -m mvat_dist.enhance --model runs/teacher talk.flac calls/ --out enhanced\n"
        "  ffmpeg -i talk.mp4 -f s16le -ac 1 -ar 48000 - | \\\n"
        "      python -m mvat_dist.enhance --model best.safetensors --rate 48000 - > enhanced.raw",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a run, a student's folder in one, or a model file")
    inputs = "audio files and folders of them; - reads raw PCM (s16le) from standard input"
    add("inputs", type=Path, nargs="+", metavar="IN", help=inputs)
    add("--out", type=Path, help="folder for the enhanced files: named as the inputs, folders as trees")
    add("--overwrite", action="store_true", help="make files anew that are there (default: leave them)")
    add("--dry", type=float, default=0.0, help="how much of the input to keep, 0 to 1 (default: %(default)g)")
    add("--processes", type=int, default=1, help="files at a time, on as many cores (default: %(default)s)")
    batch = "windows or channels per pass of the network; more pay on a GPU (default: %(default)s)"
    add("--batch", type=int, default=1, help=batch)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network runs")
    precision = "of the network's products; bf16 pays on GPUs and for large networks (default: %(default)s)"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=precision)
    add("--rate", type=int, default=16000, help="Hz, of standard input (default: %(default)s)")
    add("--channels", type=int, default=1, help="interleaved, of standard input (default: %(default)s)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as that needs no file.

    Raises:
        UserError: numbers out of range, or options that do not go together.
    """
    arguments = _parser().parse_args(argv)
    for name, low, high in (
        ("dry", 0, 1), ("processes", 1, 4096), ("batch", 1, 4096), ("rate", 1, 10**7), ("channels", 1, 1024),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if not low <= value <= high:
            raise UserError(f"--{name} is {value}: it must be from {low} to {high}")
    piped = STANDARD in arguments.inputs
    if piped and (len(arguments.inputs) > 1 or arguments.out):
        raise UserError("standard input (-) goes to standard output: give no other input and no --out")
    if arguments.out == STANDARD:
        raise UserError(
            "--out is a folder, not standard output: a pipe is read with - as the input, without --out"
        )
    if not piped and not arguments.out:
        raise UserError("give a folder for the enhanced files: --out DIR")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Enhance files into a folder, or standard input to standard output."""
    arguments = parse(argv)
    with clean_end():
        if arguments.inputs != [STANDARD]:
            _files(arguments)
        elif sys.stdin is None or sys.stdout is None:
            raise UserError("standard input or output is closed: pipe raw PCM (s16le) through both")
        else:
            _pipe(_enhancer(arguments), arguments, sys.stdin.buffer, sys.stdout.buffer)


def _files(arguments: argparse.Namespace) -> None:
    jobs = plan(arguments.inputs, arguments.out)
    # A folder in a target's place is no file that is there already: it is refused.
    todo = [job for job in jobs if arguments.overwrite or not job.target.exists() or job.target.is_dir()]
    network = _enhancer(arguments)
    _make_ready(arguments.out, jobs, todo)
    clipped = failed = 0
    with _bar(todo) as bar:
        for job, result in _results(network, todo, arguments, bar):
            if isinstance(result, str):
                bar.write(f"error: {result}", file=sys.stderr)
                failed += 1
                continue
            clipped += result.clipped
            if result.missing:
                warning = f"{job.source} was cut off ({result.missing}): the enhanced file is as short"
                bar.write(f"warning: {warning}", file=sys.stderr)
    print(f"{len(todo) - failed} files written to {arguments.out}", file=sys.stderr)
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} were there already: --overwrite makes them anew", file=sys.stderr)
    if clipped:
        print(f"note: {clipped} samples lie beyond full scale, where integer formats clip", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {len(todo)} files could not be enhanced")


def _make_ready(out: Path, jobs: Sequence[Job], todo: Sequence[Job]) -> None:
    """Make the output folder, check that it can be written, and remove what killed runs left in it."""
    make_folder(out)
    if any(job.target.parent == out for job in todo):
        check_writable(out)
    if removed := remove_abandoned(jobs):
        print(f"note: {removed} files that a killed run left half written are removed", file=sys.stderr)


def _bar(jobs: Sequence[Job]) -> tqdm[NoReturn]:
    """A progress bar in seconds of audio; it has an end where all files state their length."""
    known = [seconds for job in jobs if (seconds := duration(job.source)) is not None]
    if len(known) < len(jobs):
        return tqdm(unit=_UNIT, bar_format=_BAR_WITHOUT_END)
    return tqdm(total=sum(known), unit=_UNIT, bar_format=_BAR)


def _enhancer(arguments: argparse.Namespace) -> Enhancer:
    return enhancer.load(arguments.model, arguments.device, arguments.batch, arguments.precision)


def _results(
    network: Enhancer, jobs: Sequence[Job], arguments: argparse.Namespace, bar: tqdm[NoReturn]
) -> Iterator[tuple[Job, Result]]:
    def progress(seconds: float) -> None:
        # A header may promise less than there is, and sums of seconds are not exact.
        bar.update(seconds if bar.total is None else min(seconds, bar.total - bar.n))

    dry, processes = arguments.dry, arguments.processes
    if processes == 1:
        return enhance_one_by_one(network, jobs, dry, progress)
    load = partial(enhancer.load, arguments.model, arguments.device, arguments.batch, arguments.precision)
    return enhance_in_parallel(load, jobs, dry, processes, progress)


def _pipe(network: Enhancer, arguments: argparse.Namespace, source: BinaryIO, target: BinaryIO) -> None:
    """Raw 16-bit PCM from `source` to `target`, a window at a time.

    Raises:
        UserError: a terminal, a WAV header, an end within a frame, or nobody who reads on.
    """
    if source.isatty():
        raise UserError("standard input is a terminal: pipe raw PCM (s16le) into it")
    frame = 2 * arguments.channels
    left = bytearray()

    def blocks() -> Iterator[Audio]:
        first = True
        while content := source.read(BLOCK * frame):
            if first and content[:4] in _CONTAINERS:
                raise UserError(
                    "standard input begins as a sound file, and raw PCM (s16le) is wanted: give the file "
                    "itself, or decode it with `ffmpeg -i FILE -f s16le -`"
                )
            first = False
            complete = len(content) - len(content) % frame
            left[:] = content[complete:]
            pcm = np.frombuffer(content[:complete], "<i2").reshape(-1, arguments.channels)
            yield pcm.astype(np.float32) * np.float32(1 / 32768)

    try:
        with tqdm(unit=_UNIT, bar_format=_BAR_WITHOUT_END) as bar:
            for piece in network.stream(blocks(), arguments.rate, arguments.channels, arguments.dry):
                target.write(np.clip(np.rint(piece * 32768), -32768, 32767).astype("<i2").tobytes())
                target.flush()
                bar.update(len(piece) / arguments.rate)
    except BrokenPipeError:
        # Python would flush standard output once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())
        raise UserError("nobody reads the enhanced audio any more") from None
    if left:
        raise UserError(f"standard input ended within a frame ({len(left)} bytes left): check --channels")


if __name__ == "__main__":
    sys.exit(exit_code(main))
