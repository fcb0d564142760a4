"""What a student's loss costs, forward and backward: against its plain formula, and beside a student's step.

    python -m benchmarks.loss
    python -m benchmarks.loss --batch 4 --seconds 2 --student manner-s-0.6gf

One thread, CPU time. In every round each is timed once, one after the other; medians over rounds. The
targets, which a run computes once for all its students, are not counted on our side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.plain import enhancement_loss
from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.losses.enhancement import CompressedLoss, EnhancementLoss, WaveformLoss
from mvat_dist.losses.pesq import PesqLoss
from mvat_dist.models.manner import build

Loss = Callable[[Tensor], Tensor]
PLAIN, OURS = "authors' formula", "authors', ours"


def losses(noisy: Tensor, clean: Tensor) -> dict[str, Loss]:
    """Each of an estimate (B, T), with its targets at hand."""
    own, waveform, compressed, pesq = EnhancementLoss(), WaveformLoss(), CompressedLoss(), PesqLoss()
    targets = own.prepare(noisy, clean)
    of_compressed, of_pesq = compressed.prepare(noisy, clean), pesq.prepare(noisy, clean)
    return {
        PLAIN: lambda estimate: enhancement_loss(estimate, noisy, clean),
        OURS: lambda estimate: own(estimate, targets),
        "waveform": lambda estimate: waveform(estimate, targets),
        "compressed": lambda estimate: compressed(estimate, of_compressed),
        "pesq": lambda estimate: pesq(estimate, of_pesq),
    }


def milliseconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return 1e3 * (time.process_time() - before)


def differentiated(loss: Loss, estimate: Tensor) -> Tensor:
    """The gradient (B, T)."""
    given = estimate.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(given), given)
    return gradient


def main() -> None:
    """Measure and print."""
    arguments = _parse()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, round(arguments.seconds * SAMPLE_RATE))
    clean, noise, error = (0.05 * torch.randn(shape, generator=generator) for _ in range(3))
    noisy, estimate = clean + noise, clean + 0.3 * error
    several = losses(noisy, clean)
    torch.testing.assert_close(several[OURS](estimate), several[PLAIN](estimate), rtol=1e-5, atol=0)
    network = build(arguments.student).train()

    def step() -> None:
        found = network(noisy)
        found.square().mean().backward()

    times: dict[str, list[float]] = {name: [] for name in [*several, "network"]}
    step()
    for _ in range(arguments.rounds):
        for name, loss in several.items():
            times[name].append(milliseconds(lambda loss=loss: differentiated(loss, estimate)))
        times["network"].append(milliseconds(step))
    medians = {name: statistics.median(found) for name, found in times.items()}
    gain = medians[PLAIN] / medians[OURS]
    rows = [(name, value, value / medians["network"]) for name, value in medians.items()]
    print(
        tabulate(rows, ["", "ms", f"of {arguments.student}"], tablefmt="github", floatfmt=("", ".1f", ".2f"))
    )
    print(
        f"\n{arguments.batch} x {arguments.seconds:g} s. The authors' loss, with targets at hand: "
        f"{gain:.2f} times as fast."
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--student", default="manner-s-0.6gf", help="whose forward and backward stand beside")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
