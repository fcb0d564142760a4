"""Scores of one enhanced utterance against its clean reference, by name. Higher is better in all of them.

A score is a value or a reason why there is none, never a stand-in number: a zero for a clip that PESQ
refuses would move a mean as much as a bad network does. Every metric takes the estimate and the clean
reference as float arrays (T,) at 16 kHz and equal in length.

Importable without torch: `mvat_dist.evaluation.scorer` runs these functions in worker processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mvat_dist.errors import UserError, nearest
from mvat_dist.evaluation.metrics import dnsmos
from mvat_dist.evaluation.metrics.composite import cbak, covl, csig, segmental_snr
from mvat_dist.evaluation.metrics.perceptual import estoi, pesq_nb, pesq_wb, stoi
from mvat_dist.evaluation.metrics.score import Audio, Measure, Score
from mvat_dist.evaluation.metrics.si_sdr import si_sdr

__all__ = ["METRICS", "Audio", "Metric", "Score", "select"]


@dataclass(frozen=True)
class Metric:
    """How to compute a score and how to print it."""

    compute: Measure
    label: str
    unit: str
    decimals: int


METRICS: dict[str, Metric] = {
    "pesq_wb": Metric(pesq_wb, "PESQ-WB", "MOS", 2),
    "pesq_nb": Metric(pesq_nb, "PESQ-NB", "MOS", 2),
    "stoi": Metric(stoi, "STOI", "", 3),
    "estoi": Metric(estoi, "ESTOI", "", 3),
    "si_sdr": Metric(si_sdr, "SI-SDR", "dB", 2),
    "segsnr": Metric(segmental_snr, "SegSNR", "dB", 2),
    "csig": Metric(csig, "CSIG", "MOS", 2),
    "cbak": Metric(cbak, "CBAK", "MOS", 2),
    "covl": Metric(covl, "COVL", "MOS", 2),
    "dnsmos_sig": Metric(dnsmos.dnsmos_sig, "DNSMOS SIG", "MOS", 2),
    "dnsmos_bak": Metric(dnsmos.dnsmos_bak, "DNSMOS BAK", "MOS", 2),
    "dnsmos_ovrl": Metric(dnsmos.dnsmos_ovrl, "DNSMOS OVRL", "MOS", 2),
}
"""Every metric by the name that rows, configurations and the command line use."""

GROUPS: dict[str, tuple[str, ...]] = {
    "composite": ("csig", "cbak", "covl"),
    "dnsmos": ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl"),
    "paper": ("pesq_wb", "pesq_nb", "stoi", "estoi", "si_sdr", "segsnr", "csig", "cbak", "covl"),
}
"""Names that stand for several metrics; ``paper`` is all that reports of enhancement usually list."""


def select(names: str | Iterable[str]) -> tuple[str, ...]:
    """Metric names from a comma-separated selection, in its order, with `GROUPS` replaced by their members.

    Raises:
        UserError: an unknown or repeated name, none at all, or one whose package is missing.
    """
    chosen = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in chosen:
        if name not in METRICS and name not in GROUPS:
            raise UserError(f"unknown metric {name!r}; did you mean {nearest(name, [*METRICS, *GROUPS])}?")
    metrics = [metric for name in chosen for metric in GROUPS.get(name, (name,))]
    if not metrics:
        raise UserError(f"no metric named; there are {', '.join(METRICS)}")
    if len(set(metrics)) != len(metrics):
        raise UserError(f"a metric is named twice in {', '.join(chosen)!r}")
    if set(metrics) & set(GROUPS["dnsmos"]):
        dnsmos.check_installed()
    return tuple(metrics)
