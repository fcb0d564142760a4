"""The record of an evaluation, ``scores.json``: what was scored, on what, and the scores."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from mvat_dist.config.sizes import Size
from mvat_dist.evaluation.real_time_factor import Cost
from mvat_dist.evaluation.table import Section
from mvat_dist.runs.weights import Which

FORMAT = "mvat_dist.scores.2"

SCORES = "scores.json"
"""Name of the file."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is evaluated, as the command line says it."""

    models: list[str]
    weights: Which
    limit: int
    """Most clips of each test set; 0 is all."""
    max_seconds: float
    """Of each clip; 0 is all of it."""
    data: str | None = None
    """Where the clips come from; None for two folders."""
    noisy: str | None = None
    clean: str | None = None
    unmatched: list[str] | None = None
    """Files of the two folders that have no counterpart."""


@dataclass(frozen=True)
class Inputs:
    """All that decides a score: rows of other inputs are not taken for rows of these."""

    networks: dict[str, str]
    """Fingerprint of the weights, by name."""
    clips: dict[str, str]
    """Fingerprint of the clips, by test set."""
    metrics: list[str]
    packages: dict[str, str]
    """Versions; of DNSMOS the SHA-256 of its network."""
    device: str

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Network(Cost):
    """What is known of a network that was scored."""

    name: str
    """What its file calls it."""
    step: int | None
    """None where its file does not say."""
    size: Size | None
    """None for a classical filter."""


@dataclass(frozen=True, kw_only=True)
class Scores(Request):
    """The content of ``scores.json``."""

    format: str = FORMAT
    time: str
    """When it was written."""
    machine: str
    """Where the costs were measured."""
    reference: str | None
    """What the networks are compared with: one of them, or the noisy input; None where there is nothing."""
    fingerprint: str
    inputs: Inputs
    metrics: dict[str, dict[str, str]]
    """``label`` and ``unit`` by metric."""
    networks: dict[str, Network]
    """By the name in the rows."""
    sections: dict[str, Section]
    """By test set."""
