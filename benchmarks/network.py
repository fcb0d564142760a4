"""The network against the authors' formulation: time, memory and what each rewriting is worth.

    python -m benchmarks.network                        # 13 minutes on a busy machine
    python -m benchmarks.network --plain ~/MANNER       # against the authors' own code
    python -m benchmarks.network --only tricks

Without ``--plain`` the authors' formulation is stood in for by `benchmarks.plain`. Both networks are run in
turn in one process on one thread, and the medians of the ratios of CPU time are reported: other people's load
moves both alike. Memory is the peak of a child process that makes one forward pass, less that of one that
makes none.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.plain import enhance
from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.config.sizes import STUDENTS
from mvat_dist.models import attention, cpu_kernels, layers
from mvat_dist.models.fold import folded
from mvat_dist.models.manner import Manner, build

TEACHER = "manner-b"
COMPARED = ("manner-s-5.3gf", "manner-s-8.1gf", TEACHER)
Step = Callable[[], object]


# --- the plain formulation ---


def plain_norm(x: Tensor, *norms: nn.Module) -> Tensor:
    shares = x.split([norm.num_features for norm in norms], dim=1)
    return torch.cat([nn.BatchNorm1d.forward(n, s) for n, s in zip(norms, shares, strict=True)], dim=1)


def plain_norm_alone(self: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
    )


def plain_convs(x: Tensor, *modules: nn.Module, groups: int = 1) -> Tensor:
    convs = [cpu_kernels.conv_of(module) for module in modules]
    shares = x.chunk(groups, dim=1) if groups > 1 else [x] * len(convs)
    return torch.cat(
        [
            F.conv1d(s, c.weight, c.bias, padding=c.kernel_size[0] // 2)
            for s, c in zip(shares, convs, strict=True)
        ],
        dim=1,
    )


def plain_tall(self: nn.Conv1d, x: Tensor) -> Tensor:
    return F.conv1d(x, self.weight, self.bias, padding=self.padding, groups=self.groups)


def plain_up(self: nn.ConvTranspose1d, x: Tensor) -> Tensor:
    return F.conv_transpose1d(x, self.weight, self.bias, self.stride)


def plain_attention(self: attention.GlobalView, chunks: Tensor) -> Tensor:
    tokens = chunks.flatten(0, 1)
    query, key, value = (
        project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for project in (self.w_qs, self.w_ks, self.w_vs)
    )
    attention = torch.softmax(query / query.shape[-1] ** 0.5 @ key.mT, dim=-1)
    return self.fc((attention @ value).transpose(1, 2).flatten(2)).view_as(chunks)


def sdpa_attention(self: attention.GlobalView, chunks: Tensor) -> Tensor:
    """All four projections, torch's attention: what is left of the gain without the smaller products."""
    tokens = chunks.flatten(0, 1)
    query, key, value = (
        project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for project in (self.w_qs, self.w_ks, self.w_vs)
    )
    attended = F.scaled_dot_product_attention(query, key, value)
    return self.fc(attended.transpose(1, 2).flatten(2)).view_as(chunks)


def plain_local(self: attention.LocalView, chunks: Tensor) -> Tensor:
    batch, _, pieces, length = chunks.shape
    rows = chunks.transpose(1, 2).flatten(0, 1)  # (B * P, n, C)
    wide, narrow = cpu_kernels.conv_of(self.depth_conv), cpu_kernels.conv_of(self.conv)
    local = F.silu(self.depth_conv[1](plain_tall(wide, rows)))
    summary = torch.stack([local.amax(1), local.mean(1)], dim=1)
    weights = torch.sigmoid(self.conv[1](plain_tall(narrow, summary)))
    return weights.view(batch, pieces, 1, length).transpose(1, 2)


def plain_views(self: attention.MultiViewBlock, branches: Tensor) -> Tensor:
    first, second, third = branches.chunk(3, dim=1)
    frames, length = branches.shape[-1], self.chunk_length
    near, far = attention.chunk(second, length), attention.chunk(third, length)
    attended = attention.overlap_add(self.global_attn(near), frames)
    return torch.cat(
        [self.channel_attn(first), attended, attention.overlap_add(far * self.local_attn(far), frames)], dim=1
    )


Patch = tuple[Any, str, Any]
TRICKS: dict[str, list[Patch]] = {
    "scaled_dot_product_attention, keys and values unprojected": [
        (attention.GlobalView, "forward", plain_attention)
    ],
    "of these: keys and values unprojected": [(attention.GlobalView, "forward", sdpa_attention)],
    "local view as products with banded matrices": [(attention.LocalView, "forward", plain_local)],
    "attention's tokens filled up to whole vectors": [(attention, "VECTOR", 1)],
    "overlap-add of one channel of local weights": [(attention.MultiViewBlock, "_views", plain_views)],
    "depthwise convolution along an image's height": [(cpu_kernels.TallConv1d, "forward", plain_tall)],
    "first convolution's lags as channels": [(cpu_kernels.FromMonoConv1d, "forward", plain_tall)],
    "last convolution's taps as channels": [(cpu_kernels.ToMonoConv1d, "forward", plain_tall)],
    "transposed convolutions as products": [(cpu_kernels.UpConv1d, "forward", plain_up)],
    "maps of one input as one product": [
        (module, "conv_together", plain_convs) for module in (layers, attention)
    ],
    "BatchNorm with vectorised sums, several at once": [
        (cpu_kernels.BatchNorm, "forward", plain_norm_alone),
        *[(module, "norm_together", plain_norm) for module in (layers, attention)],
    ],
    "mask gates in tiles that fit the cache": [(cpu_kernels, "TILE", 10**9)],
}
PARTS = {"of these: keys and values unprojected"}


@contextmanager
def patched(patches: list[Patch]) -> Iterator[None]:
    """The network without some of its rewritings."""
    undo = [mock.patch.object(owner, name, value) for owner, name, value in patches]
    for one in undo:
        one.start()
    try:
        yield
    finally:
        for one in reversed(undo):
            one.stop()


ALL = [patch for name, patches in TRICKS.items() if name not in PARTS for patch in patches]


class PlainManner(nn.Module):
    """A network computed in the plain formulation, with weights of its own."""

    def __init__(self, network: Manner) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, noisy: Tensor) -> Tensor:
        tensors = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        return enhance(tensors, self.network.size, noisy, training=self.training)[0]


class TheirManner(nn.Module):
    """The authors' module, (B, T) to (B, T)."""

    def __init__(self, folder: Path, network: Manner) -> None:
        super().__init__()
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        size = network.size
        module = importlib.import_module("src.models" if size.kind == "base" else "src.models_small")
        self.network = module.MANNER(
            1, 1, hidden=size.hidden, depth=size.depth, kernel_size=size.kernel_size, stride=size.stride,
            growth=2, head=size.heads, segment_len=size.chunk,
        )  # fmt: skip
        self.network.load_state_dict(network.state_dict())

    def forward(self, noisy: Tensor) -> Tensor:
        estimate: Tensor = self.network(noisy.unsqueeze(1))[:, 0]
        return estimate


# --- measuring ---


def in_turn(steps: list[Step], repeats: int, *, warm: bool = True) -> list[list[float]]:
    """CPU seconds of every step, by repetition; if `warm`, each has run once before."""
    for step in steps if warm else []:
        step()
    rounds = []
    for _ in range(repeats):
        rounds.append([])
        for step in steps:
            before = time.thread_time()
            step()
            rounds[-1].append(time.thread_time() - before)
    return rounds


def ratio(rounds: list[list[float]], numerator: int, denominator: int) -> float:
    return statistics.median(one[numerator] / one[denominator] for one in rounds)


def median(rounds: list[list[float]], index: int) -> float:
    return statistics.median(one[index] for one in rounds)


def clip(seconds: float, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(batch, round(seconds * SAMPLE_RATE), generator=generator)


def forward(model: nn.Module, noisy: Tensor) -> Step:
    def step() -> None:
        with torch.no_grad():
            model(noisy)

    return step


def training(model: nn.Module, noisy: Tensor) -> Step:
    def step() -> None:
        model.zero_grad()
        model(noisy).square().mean().backward()

    return step


def pair(name: str, plain: Path | None) -> tuple[nn.Module, Manner]:
    torch.manual_seed(0)
    network = build(name)
    return (TheirManner(plain, network) if plain else PlainManner(network)), network


def speedups(plain: Path | None) -> str:
    """Ours against plain: forward at 1, 4 and 10 s and a training step at 4 s."""
    lines = []
    for name in COMPARED:
        old, new = pair(name, plain)
        old.eval()
        form = folded(new.eval())
        for seconds, repeats in ((1, 5), (4, 5), (10, 3 if name != TEACHER else 2)):
            noisy = clip(seconds)
            with torch.no_grad():
                expected = old(noisy)
                error = max(((n(noisy) - expected).norm() / expected.norm()).item() for n in (new, form))
            assert error < 1e-4, f"{name}: not the same function, relative error {error:.1e}"
            rounds = in_turn([forward(old, noisy), forward(new, noisy), forward(form, noisy)], repeats)
            lines.append([name, "forward", seconds, *_row(rounds)])
        old.train()
        new.train()
        noisy = clip(4)
        rounds = in_turn([training(old, noisy), training(new, noisy)], 5 if name != TEACHER else 2)
        lines.append([name, "forward + backward", 4, *_row(rounds)])
    heads = ["network", "pass", "audio s", "plain s", "ours s", "gain", "inference form s", "gain"]
    return tabulate(lines, heads, tablefmt="github", floatfmt=".3g", missingval="-")


def _row(rounds: list[list[float]]) -> list[float | None]:
    row: list[float | None] = [median(rounds, 0), median(rounds, 1), ratio(rounds, 0, 1)]
    return [*row, median(rounds, 2), ratio(rounds, 0, 2)] if len(rounds[0]) > 2 else [*row, None, None]


def tricks(name: str = "manner-s-8.1gf") -> str:
    """Every rewriting alone on the plain network, and what its absence costs the whole."""
    network, noisy = build(name), clip(4)
    lines = []
    for trick, patches in TRICKS.items():
        rest = [p for other, its in TRICKS.items() if other != trick and other not in PARTS for p in its]
        line = [trick]
        for mode, step in (("eval", forward), ("train", training)):
            network.train(mode == "train")
            # Next to each other in every round, so that load that comes and goes meets all four.
            four = [_within(its, step(network, noisy)) for its in (ALL, rest, patches, [])]
            rounds = in_turn(four, 3, warm=False)
            line.append("-" if trick in PARTS else f"{ratio(rounds, 0, 1):.2f}")
            line.append(f"{ratio(rounds, 2, 3):.2f}")
        lines.append(line)
    heads = ["rewriting", "forward: alone", "in the whole", "forward + backward: alone", "in the whole"]
    return f"{name}, 4 s\n\n" + tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def _within(patches: list[Patch], step: Step) -> Step:
    def inside() -> None:
        with patched(patches):
            step()

    return inside


def real_time_factors() -> str:
    """Every network's inference form on one thread, in fp32 and under bf16 autocast, and its deviation."""
    lines = []
    for name in (*STUDENTS, TEACHER):
        network = build(name).eval()
        form, noisy = folded(network), clip(4)

        def half(form: nn.Module = form, noisy: Tensor = noisy) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return form(noisy)

        rounds = in_turn([forward(network, noisy), forward(form, noisy), half], 5)
        lines.append([name, *(median(rounds, at) / 4 for at in range(3))])
    heads = ["network", "RTF, eval mode", "RTF, inference form", "RTF, its bf16 autocast"]
    return tabulate(lines, heads, tablefmt="github", floatfmt=".3f")


# --- memory against length ---


def child(which: str, name: str, seconds: float, plain: Path | None) -> None:
    """One forward pass in this process: its CPU seconds and the growth of its peak, in MiB."""
    torch.set_num_threads(1)
    model = folded(build(name)) if which == "ours" else pair(name, plain)[0].eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    noisy = clip(seconds)
    started = time.thread_time()
    forward(model, noisy)()
    spent = time.thread_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(spent, (peak - before) / 1024, peak / 1024)


def lengths(plain: Path | None, out: Path | None) -> str:
    """Time and memory of one pass of the teacher and the 5.3GF student against the audio's length."""
    lines = []
    for name in (TEACHER, "manner-s-5.3gf"):
        for seconds in (1, 4, 10, 30):
            for which in ("plain", "ours"):
                if which == "plain" and seconds == 30:
                    continue  # the teacher's asks for one buffer of 18 GB
                lines.append([name, which, seconds, *_in_child(which, name, seconds, plain)])
    if out:
        _draw(lines, out)
    heads = [
        "network",
        "formulation",
        "audio s",
        "CPU s",
        "memory of the pass MiB",
        "peak of the process MiB",
    ]
    return tabulate(lines, heads, tablefmt="github", floatfmt=(*[""] * 3, ".2f", ".0f", ".0f"))


def _in_child(which: str, name: str, seconds: float, plain: Path | None) -> list[float]:
    argv = [sys.executable, "-m", "benchmarks.network", "--child", which, name, str(seconds)]
    argv += ["--plain", str(plain)] if plain else []
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def _draw(lines: list[list[Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, column, label in zip(panels, (3, 5), ("CPU seconds", "peak of the process, MiB"), strict=True):
        for name in dict.fromkeys(line[0] for line in lines):
            for which, style in (("plain", "--o"), ("ours", "-o")):
                points = [line for line in lines if line[:2] == [name, which]]
                panel.loglog(
                    [p[2] for p in points], [p[column] for p in points], style, label=f"{name}, {which}"
                )
        panel.set(xlabel="audio, s", ylabel=label)
        panel.grid(visible=True, which="both", alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description="The network against the authors' formulation.",
        epilog="example: python -m benchmarks.network --plain ~/MANNER --picture lengths.png",
    )
    parser.add_argument("--plain", type=Path, help="a clone of the authors' repository to compare with")
    parser.add_argument("--only", choices=["speedups", "tricks", "rtf", "lengths"])
    parser.add_argument("--picture", type=Path, help="PNG of time and memory against length")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        which, name, seconds = arguments.child
        child(which, name, float(seconds), arguments.plain)
        return
    tables: dict[str, Callable[[], str]] = {
        "speedups": lambda: speedups(arguments.plain),
        "tricks": tricks,
        "rtf": real_time_factors,
        "lengths": lambda: lengths(arguments.plain, arguments.picture),
    }
    began = time.monotonic()
    for name, make in tables.items():
        if arguments.only in (None, name):
            print(f"## {name}\n\n{make()}\n", flush=True)
    print(f"{time.monotonic() - began:.0f} s in all, torch {torch.__version__}, one thread")


if __name__ == "__main__":
    main()
