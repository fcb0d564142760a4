"""Bounded numbers for the fields of the configuration; ``--help`` shows their names.

The parser refuses NaN, infinity and values out of bounds, in files and on the command line alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    PositiveNumber = float
    NonNegativeNumber = float
    FiniteNumber = float
    ClosedUnitInterval = float
    Decay = float
    TempoFactor = float
    Dbfs = float
    BandEdge = float
else:
    from jsonargparse import typing as jsonargparse_types

    def _number(name: str, low: float, high: float, ends: tuple[str, str] = (">=", "<")) -> type:
        return jsonargparse_types.restricted_number_type(name, float, [(ends[0], low), (ends[1], high)])

    PositiveInt = jsonargparse_types.PositiveInt
    NonNegativeInt = jsonargparse_types.NonNegativeInt
    ClosedUnitInterval = jsonargparse_types.ClosedUnitInterval
    PositiveNumber = _number("PositiveNumber", 0, math.inf, ends=(">", "<"))
    NonNegativeNumber = _number("NonNegativeNumber", 0, math.inf)
    FiniteNumber = _number("FiniteNumber", -math.inf, math.inf, ends=(">", "<"))
    Decay = _number("Decay", 0, 1)
    TempoFactor = _number("TempoFactor", 0.5, 2, ends=(">=", "<="))
    Dbfs = _number("Dbfs", -math.inf, 0, ends=(">", "<="))
    BandEdge = _number("BandEdge", 100, 8000, ends=(">=", "<="))

IN_WORDS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number, 0 or above",
    "PositiveNumber": "a finite number above 0",
    "NonNegativeNumber": "a finite number, 0 or above",
    "FiniteNumber": "a finite number",
    "ClosedUnitInterval": "a share from 0 to 1",
    "Decay": "a factor from 0 to below 1",
    "TempoFactor": "a factor between 0.5 and 2",
    "Dbfs": "a level in dBFS of at most 0, which is full scale",
    "BandEdge": "a band edge from 100 to 8000 Hz",
}
"""What an error message says of a value that is none of its type."""
