"""Enhance recordings of any rate, channels, length and format with a trained network."""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from mvat_dist.config.cli import CommandParser
from mvat_dist.errors import UserError, exit_code
from mvat_dist.inference import enhancer
from mvat_dist.inference.audio_files import (
    Enhanced,
    Job,
    Progress,
    check_writable,
    enhance_file,
    plan,
    remove_abandoned,
    seconds,
)
from mvat_dist.inference.endings import SIGNALS, TIDY_SECONDS, Ended, clean_end, handler
from mvat_dist.inference.enhancer import BLOCK, Enhancer
from mvat_dist.inference.overlap_add import Audio
from mvat_dist.io import make_folder

STANDARD = Path("-")
"""Standard input and output."""

_POLL_SECONDS = 0.5
_REQUESTS = 3
_UNIT = " s of audio"
_BAR = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}{unit} [{remaining} left, {rate_noinv_fmt}]"
_BAR_WITHOUT_END = "{n:.0f}{unit} [{elapsed}, {rate_noinv_fmt}]"
_CONTAINERS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b"ID3\x03", b"ID3\x04")


_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the next file would meet, too."""

Result = Enhanced | str
"""Of one file: what was written, or why it could not be enhanced."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m mvat_dist.enhance",
        "Enhance recordings. Rate, channels, length, level and format stay as they are, and memory does not\n"
        "grow with the length. The networks hear 16 kHz: nothing above 8 kHz is left, except what --dry\n"
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
    batch = "windows or channels that the network hears at once; more pay on a GPU (default: %(default)s)"
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
    run = _one_by_one if arguments.processes == 1 else _in_parallel
    with _bar(todo) as bar, closing(run(network, todo, arguments, bar)) as results:
        for job, result in results:
            if isinstance(result, str):
                bar.write(f"error: {result}", file=sys.stderr)
                failed += 1
                continue
            clipped += result.clipped
            if result.missing:
                told = f"warning: {job.source} was cut off ({result.missing}): the enhanced file is as short"
                bar.write(told, file=sys.stderr)
    print(f"{len(todo) - failed} files written to {arguments.out}", file=sys.stderr)
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} were there already: --overwrite makes them anew", file=sys.stderr)
    if clipped:
        print(f"note: {clipped} samples lie beyond full scale, where integer formats clip", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {len(todo)} files could not be enhanced")


def _make_ready(out: Path, jobs: Sequence[Job], todo: Sequence[Job]) -> None:
    """A folder that can be written, without what killed runs left in it."""
    make_folder(out)
    if any(job.target.parent == out for job in todo):
        check_writable(out)
    if removed := remove_abandoned(jobs):
        print(f"note: {removed} files that a killed run left half written are removed", file=sys.stderr)


def _bar(jobs: Sequence[Job]) -> tqdm[NoReturn]:
    """With an end where all files say how long they are."""
    known = [length for job in jobs if (length := seconds(job.source)) is not None]
    if len(known) < len(jobs):
        return tqdm(unit=_UNIT, bar_format=_BAR_WITHOUT_END)
    return tqdm(total=sum(known), unit=_UNIT, bar_format=_BAR)


def _enhancer(arguments: argparse.Namespace) -> Enhancer:
    return enhancer.load(arguments.model, arguments.device, arguments.batch, arguments.precision)


def _attempt(network: Enhancer, job: Job, dry: float, progress: Progress) -> Result:
    try:
        return enhance_file(network, job, dry, progress)
    except UserError as error:
        return str(error)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            raise
        return f"{job.source}: {error}"


def _show(bar: tqdm[NoReturn], written: float) -> None:
    # A header may promise less than there is, and sums of seconds are not exact.
    bar.update((written if bar.total is None else min(written, bar.total)) - bar.n)


def _one_by_one(
    network: Enhancer, jobs: Sequence[Job], arguments: argparse.Namespace, bar: tqdm[NoReturn]
) -> Generator[tuple[Job, Result]]:
    for job in jobs:
        yield job, _attempt(network, job, arguments.dry, lambda more: _show(bar, bar.n + more))


def _in_parallel(
    _: Enhancer, jobs: Sequence[Job], arguments: argparse.Namespace, bar: tqdm[NoReturn]
) -> Generator[tuple[Job, Result]]:
    """In the order in which the files are done; every process loads a network of its own.

    Raises:
        UserError: a process was ended.
    """
    context = multiprocessing.get_context("spawn")
    written = context.Value("d", 0.0)
    pool = ProcessPoolExecutor(arguments.processes, context, _begin, (arguments, written))
    try:
        pending = {pool.submit(_attempt_here, job) for job in jobs}
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            _show(bar, written.value)
            yield from (one.result() for one in done)
    except BrokenProcessPool as error:
        raise UserError("a process was ended, perhaps for lack of memory: use fewer --processes") from error
    except BaseException:
        # Their files would be finished first, and those that they have been handed for later.
        _end(multiprocessing.active_children())
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Have them remove what is half written, and end."""
    for _ in range(_REQUESTS):
        for process in processes:
            process.terminate()
        # The exception that it raises there may have been lost in a finaliser: the next one is not.
        deadline = time.monotonic() + TIDY_SECONDS + 1
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if not any(process.is_alive() for process in processes):
            return
    for process in processes:
        process.kill()


class _Child:
    """What a process of the pool keeps between files."""

    network: Enhancer
    dry: float
    written: Synchronized[float]


def _begin(arguments: argparse.Namespace, written: Synchronized[float]) -> None:
    """Make this process ready for files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.processes))
    _Child.network, _Child.dry, _Child.written = _enhancer(arguments), arguments.dry, written


def _follow_parent() -> None:
    """End with the parent: a process of a pool would wait for the next file for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(TIDY_SECONDS)
    os._exit(1)


def _attempt_here(job: Job) -> tuple[Job, Result]:
    # A process at work removes what it has half written. Of the idle ones, Ctrl-C, which reaches every
    # process, is kept away: they are ended later.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        return job, _attempt(_Child.network, job, _Child.dry, _count)
    except Ended:
        os._exit(1)  # an exception would be handed to the parent, and the next file begun
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _count(more: float) -> None:
    with _Child.written.get_lock():
        _Child.written.value += more


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
            whole = len(content) - len(content) % frame
            left[:] = content[whole:]
            pcm = np.frombuffer(content[:whole], "<i2").reshape(-1, arguments.channels)
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
