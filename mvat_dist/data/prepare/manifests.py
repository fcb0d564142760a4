"""What a subset's manifest says of its content, from the indices and from the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.shards.format import Kind


def measured(rows: npt.NDArray[np.void], kind: Kind) -> dict[str, Any]:
    """What follows from the rows of all indices: counts, hours, and how lengths, levels and SNRs spread."""
    return {
        "utterances": len(rows),
        "hours": round(int(rows["samples"].sum()) / SAMPLE_RATE / 3600, 4),
        "seconds": _spread(rows["samples"] / SAMPLE_RATE, 5),
        "level_dbfs": _spread(rows["level_dbfs"], 5),
        **({"snr_db": _spread(rows["snr_db"], 5)} if kind == "pairs" else {}),
    }


def counted(values: Sequence[int]) -> dict[str, int]:
    """Value -> how often it occurs, in increasing order."""
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _spread(values: npt.NDArray[np.floating[Any]], width: float) -> dict[str, Any]:
    """Quantiles, and counts in bins of `width` (lower edge -> count), of the finite values."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {"quantiles": {}, "histogram": {}}
    shares = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    quantiles = {f"{share:g}": round(float(np.quantile(finite, share)), 2) for share in shares}
    bins = Counter((np.floor(finite / width) * width).tolist())
    return {"quantiles": quantiles, "histogram": {f"{edge:g}": bins[edge] for edge in sorted(bins)}}
