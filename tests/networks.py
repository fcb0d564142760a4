"""Small networks that behave like trained ones."""

from __future__ import annotations

from pathlib import Path

import torch

from mvat_dist.config.sizes import Size
from mvat_dist.models import weights
from mvat_dist.models.manner import Manner, build

TINY = Size("small", 6, depth=2, chunk=16)


def loud(size: Size) -> Manner:
    """In eval mode, with statistics of its own in BatchNorm and an output about as loud as its input."""
    torch.manual_seed(0)
    made = build(size).train()
    with torch.no_grad():
        made(0.1 * torch.randn(4, 8000))
        out = made.eval()(0.1 * torch.randn(4, 8000))
        made.manner_block.out_conv[0].weight *= 0.1 / out.std()
    return made


def tiny_file(folder: Path) -> Path:
    """A model file of a `loud` network of size `TINY`."""
    file = folder / "tiny.safetensors"
    weights.save(file, loud(TINY).state_dict(), name="tiny", size=TINY, step=1)
    return file
