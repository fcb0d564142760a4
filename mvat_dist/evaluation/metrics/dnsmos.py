"""DNSMOS P.835: opinions of speech, background and overall quality predicted from the estimate alone.

Reddy, Gopal and Cutler, "DNSMOS P.835: A Non-Intrusive Perceptual Objective Speech Quality Metric to
Evaluate Noise Suppressors" (ICASSP 2022). The network is Microsoft's ``sig_bak_ovr.onnx`` (CC-BY 4.0), run
here by onnxruntime; windows and calibration are those of its authors' script. Higher is better.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.errors import UserError
from mvat_dist.evaluation.metrics.score import Audio, Score, finite, remembering, unusable

WEIGHTS_VARIABLE = "MVAT_DNSMOS"
"""Environment variable with the path of ``sig_bak_ovr.onnx``; without it, the one in `speechmos` is taken."""

_ORIGIN = "sig_bak_ovr.onnx of github.com/microsoft/DNS-Challenge"

WINDOW = 144160
"""Samples: 9.01 s. Shorter clips are repeated until they fill one."""

_CALIBRATION = (
    ("sig", (-0.08397278, 1.22083953, 0.0052439)),
    ("bak", (-0.13166888, 1.60915514, -0.39604546)),
    ("ovrl", (-0.06766283, 1.11546468, 0.04602535)),
)
"""Polynomials, highest power first, in the order of the network's outputs."""


def check_installed() -> None:
    """Find out before the first clip whether DNSMOS can be computed here.

    Raises:
        UserError: onnxruntime or the weights are missing.
    """
    weights = weights_file()
    if importlib.util.find_spec("onnxruntime") is None or weights is None:
        raise UserError(
            "dnsmos is not installed: leave it out of --metrics, or pip install 'mvat_dist[dnsmos]', or "
            f"install onnxruntime and give --dnsmos the file {_ORIGIN}"
        )
    if not weights.is_file():
        raise UserError(f"--dnsmos {weights}: no such file; it should be {_ORIGIN}")
    try:
        _session(weights)
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise UserError(f"--dnsmos {weights} is no ONNX network that onnxruntime can read") from error


def weights_file() -> Path | None:
    """The weights that would be used; None where there are none."""
    if named := os.environ.get(WEIGHTS_VARIABLE):
        return Path(named)
    package = importlib.util.find_spec("speechmos")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"


@cache
def _session(weights: Path) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")  # an extra, without types
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


@remembering
def _opinions(estimate: Audio, clean: Audio) -> dict[str, Score]:
    if failure := unusable(estimate, clean):
        return {name: Score(None, failure) for name, _ in _CALIBRATION}
    weights = weights_file()
    assert weights is not None, "check_installed comes first"
    session = _session(weights)
    repeated = estimate.astype(np.float32)
    while repeated.size < WINDOW:
        repeated = np.concatenate([repeated, repeated])
    # The authors count the windows in whole seconds: a hop of 1 s, and what is left at the end is not used.
    starts = range(0, max(1, repeated.size // SAMPLE_RATE - 9) * SAMPLE_RATE, SAMPLE_RATE)
    (name,) = [tensor.name for tensor in session.get_inputs()]
    raw = np.array([session.run(None, {name: repeated[None, at : at + WINDOW]})[0][0] for at in starts])
    return {
        output: finite(np.polyval(polynomial, raw[:, number]).mean())
        for number, (output, polynomial) in enumerate(_CALIBRATION)
    }


def dnsmos_sig(estimate: Audio, clean: Audio) -> Score:
    """Predicted opinion of the speech, about 1 to 5; the reference is not used."""
    return _opinions(estimate, clean)["sig"]


def dnsmos_bak(estimate: Audio, clean: Audio) -> Score:
    """Predicted opinion of the background, about 1 to 5; the reference is not used."""
    return _opinions(estimate, clean)["bak"]


def dnsmos_ovrl(estimate: Audio, clean: Audio) -> Score:
    """Predicted opinion of the overall quality, about 1 to 5; the reference is not used."""
    return _opinions(estimate, clean)["ovrl"]
