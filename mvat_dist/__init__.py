"""Distil one strong MANNER denoiser into a family of fast ones, on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvat_dist.distributed.device import Precision
    from mvat_dist.inference.enhancer import Enhancer

__all__ = ["load"]


def load(path: str | Path, device: str = "auto", batch: int = 1, precision: Precision = "fp32") -> Enhancer:
    """A model to enhance with: ``mvat_dist.load("best.safetensors").enhance(audio, sample_rate)``.

    Args and errors: `mvat_dist.inference.enhancer.load`.
    """
    # Here, for the package must be importable at once and without torch.
    from mvat_dist.inference import enhancer

    return enhancer.load(path, device, batch, precision)
