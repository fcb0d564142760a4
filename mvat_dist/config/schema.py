"""The typed configuration of a run: dataclasses, YAML files under ``configs/`` and dotted overrides.

Every field has its unit and meaning below it; ``--help`` of ``mvat_dist.train`` prints the same
words. Precedence: command line over ``--config FILE`` over these defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mvat_dist.config.bounds import (
    BandEdge,
    ClosedUnitInterval,
    Dbfs,
    Decay,
    FiniteNumber,
    NonNegativeInt,
    NonNegativeNumber,
    PositiveInt,
    PositiveNumber,
    TempoFactor,
)
from mvat_dist.config.sizes import Size, View

SAMPLE_RATE = 16_000
"""Hz. MANNER is defined at this rate; `mvat_dist.pack` converts every corpus to it."""

Method = Literal["none", "output", "mvat", "mvat+output"]


@dataclass
class DataConfig:
    """The training data, and how a segment is made from them."""

    train: str = "shards/dns"
    """Folder written by `mvat_dist.pack`: a corpus with training subsets. Also a URL (s3://, gs://, http://,
    https://), or a quoted pattern that joins several: 'shards/{dns-en,dns-de}', 's3://bucket/dns-*'."""
    valid: str = ""
    """One packed pairs subset for validation, given as `train` is; empty: the subset `valid` of `train`."""
    cache_dir: str = ""
    """Local folder for copies of the shards at URLs, shared by the processes of a node; empty:
    mvat_dist in $XDG_CACHE_HOME, or in ~/.cache."""
    cache_gb: PositiveNumber = 200.0
    """Largest size of these copies in GB; the least recently used are removed first."""
    mode: Literal["auto", "dynamic", "premixed"] = "auto"
    """`dynamic` mixes clean speech and noise on the fly, `premixed` reads pairs of noisy and clean
    recordings; `auto` prefers `dynamic` where the corpus has speech and noise."""
    segment_seconds: PositiveNumber = 4.0
    """Length of one training segment in seconds."""
    stride_seconds: NonNegativeNumber = 0.0
    """Premixed mode: hop in seconds of a fixed grid of segments, each visited once an epoch;
    0 takes one random crop of every utterance an epoch instead."""
    snr_db: tuple[FiniteNumber, FiniteNumber] = (-5.0, 20.0)
    """Dynamic mode: lowest and highest signal-to-noise ratio in dB, drawn uniformly."""
    level_dbfs: tuple[Dbfs, Dbfs] = (-35.0, -15.0)
    """Dynamic mode: lowest and highest RMS level of the mixture in dBFS, drawn uniformly."""
    reverb_probability: ClosedUnitInterval = 0.3
    """Dynamic mode: share of segments whose speech is convolved with a room impulse response."""
    synthetic_rooms: ClosedUnitInterval = 0.0
    """Dynamic mode: share of these rooms that are synthetic (exponentially decaying noise of 0.2 to 1 s), for
    a corpus with few or similar rooms; 1 needs none."""
    tempo_probability: ClosedUnitInterval = 0.2
    """Share of segments whose tempo is changed (pitch kept)."""
    tempo_range: tuple[TempoFactor, TempoFactor] = (0.9, 1.1)
    """Lowest and highest tempo factor; above 1 is faster."""
    gain_db: tuple[FiniteNumber, FiniteNumber] = (0.0, 0.0)
    """Premixed mode: range in dB of a random gain applied to noisy and clean alike."""
    remix_probability: ClosedUnitInterval = 0.0
    """Premixed mode: share of segments whose noise is exchanged for that of another pair."""
    activity_threshold: ClosedUnitInterval = 0.0
    """Dynamic mode: speech with a smaller share of active 50 ms frames is drawn again; the DNS synthesizer
    takes 0.6, 0 asks only that it is not silent."""
    snr_kind: Literal["whole", "active"] = "whole"
    """Dynamic mode: the ratio over the whole segment, or over the frames in which the noise is active."""
    reverb_target: Literal["reverberant", "early", "dry"] = "reverberant"
    """Dynamic mode: what of a reverberant room stays in the clean target: all of it, the first 50 ms, or the
    direct sound alone."""
    bandwidth_probability: ClosedUnitInterval = 0.0
    """Share of segments whose noisy side is limited in bandwidth."""
    bandwidth_hz: tuple[BandEdge, BandEdge] = (2000.0, 7000.0)
    """Lowest and highest upper band edge in Hz, drawn uniformly."""
    codec_probability: ClosedUnitInterval = 0.0
    """Share of segments whose noisy side goes through a lossy codec."""
    codecs: str = "mu-law,gsm,mp3,vorbis"
    """Comma-separated codecs to choose from: `mu-law` and `gsm` at 8 kHz, as on the telephone, `mp3`,
    `vorbis` and the slow `opus`."""
    variants: NonNegativeInt = 0
    """Different segments made of every item, taken in turn by the epochs, so that a cache of the
    teacher can hold them all; 0 makes new ones in every epoch."""
    on_bad_sample: Literal["fatal", "skip"] = "fatal"
    """A damaged utterance ends the run, or its segment is replaced by another one and counted (`skip`)."""
    max_bad_samples: ClosedUnitInterval = 0.001
    """Largest share of segments that `skip` may replace."""
    workers: NonNegativeInt = 2
    """Reader processes per rank; 0 reads in the training process."""


@dataclass
class TeacherConfig:
    """The teacher. ``--teacher FILE`` is short for ``--teacher.file FILE``."""

    file: str = ""
    """A run folder, a student folder in one, or a checkpoint of the authors; not used by method `none`."""
    source: Literal["live", "cache"] = "live"
    """`live` runs the teacher on every batch; `cache` reads its targets for the same segments."""
    cache: str = ""
    """Folder written by `mvat_dist.cache`."""


@dataclass
class LossConfig:
    """Terms of a student's own loss beside the authors' loss (arXiv 2203.02181)."""

    waveform: NonNegativeNumber = 0.0
    """Factor of an added relative distance of waveforms, mean|estimate - clean| / mean|noisy|. The authors'
    loss has an absolute one, which at usual levels of speech is a hundredth of its spectral terms, so that
    short trainings do not learn the phase. 0: none."""
    compressed: NonNegativeNumber = 0.0
    """Factor of an added distance of compressed spectra (arXiv 2008.06412), in which quiet parts, which PESQ
    heeds, weigh more. It does not depend on the level. 0: none."""
    pesq: NonNegativeNumber = 0.0
    """Factor of an added differentiable PESQ (ITU-T P.862), in points of its raw score. It depends neither
    on level nor on phase, so use it with `waveform`. 0: none."""
    pesq_after: ClosedUnitInterval = 0.0
    """Share of the training after which `pesq` counts. Fresh weights want some 0.2: with `pesq` from the
    start they settle on a phase that `waveform` cannot correct later."""


@dataclass
class DistilConfig:
    """The distillation from the teacher (arXiv 2208.10367)."""

    method: Method = "mvat"
    """`none` trains alone; `output` adds the distance to the teacher's output; `mvat` adds
    multi-view attention transfer; `mvat+output` adds both."""
    weight: NonNegativeNumber = 1.0
    """Lambda: factor of the attention-transfer loss."""
    output_weight: NonNegativeNumber = 1.0
    """Factor of the output-distillation loss."""
    fade_by: ClosedUnitInterval = 0.0
    """Share of the training by which both factors have fallen linearly to 0, so that the student ends with
    its own loss; a live teacher no longer runs from then on. 0 keeps both factors constant."""
    beta_channel: NonNegativeNumber = 1.0
    """Factor of the channel view's maps; 0 switches the view off."""
    beta_global: NonNegativeNumber = 1.0
    """Factor of the global view's maps; 0 switches the view off."""
    beta_local: NonNegativeNumber = 1.0
    """Factor of the local view's maps; 0 switches the view off."""

    @property
    def view_betas(self) -> dict[View, float]:
        """Factor of each view's maps."""
        return {"channel": self.beta_channel, "global": self.beta_global, "local": self.beta_local}


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: PositiveNumber = 1e-3
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square. `onecycle` moves the first
    between 0.95 and 0.85 instead, against the learning rate (Smith and Topin, 2017)."""
    eps: PositiveNumber = 1e-8
    weight_decay: NonNegativeNumber = 0.0
    """Decoupled weight decay; 0 makes AdamW equal Adam, the authors' choice."""
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    """Learning rate over the run's steps."""
    warmup_fraction: ClosedUnitInterval = 0.3
    """Share of the steps in which the learning rate rises to its peak."""
    clip_norm: NonNegativeNumber = 5.0
    """Largest 2-norm of a student's gradient; 0 does not clip."""


@dataclass
class EngineConfig:
    """How DeepSpeed runs each student."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ZeRO partitions over ranks: 0 nothing (fastest at 1 to 25 M parameters), 1 optimiser
    state, 2 and gradients, 3 and parameters."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` is torch.autocast with fp32 weights, BatchNorm and losses; `auto` is bf16 on a GPU
    that supports it and fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sync_batchnorm: bool = False
    """Normalise over the micro-batches of all ranks (CUDA only)."""
    freeze_batchnorm: bool = False
    """Keep BatchNorm's running statistics and normalise with them, as when fine-tuning."""


@dataclass
class TrainConfig:
    """Length of the training, batch sizes, validation, checkpoints."""

    steps: PositiveInt = 100_000
    """Optimiser steps of the whole run."""
    batch: PositiveInt = 32
    """Segments per optimiser step over all ranks; it does not change with the number of ranks."""
    micro_batch: PositiveInt = 4
    """Largest number of segments per rank and forward pass; smaller where the batch does not divide.
    BatchNorm normalises over them in training, so they are part of the run's fingerprint."""
    validate_every: PositiveInt = 1_000
    """Optimiser steps between validations; the last step always validates."""
    save_every: PositiveInt = 1_000
    """Optimiser steps between checkpoints; the last step always saves."""
    keep: PositiveInt = 2
    """Complete checkpoints kept besides each student's best."""
    batchnorm_momentum: ClosedUnitInterval = 0.0
    """Share of the newest batch in BatchNorm's running statistics; 0 keeps the network's own (0.01 in
    most places), which needs some 500 steps to forget its start: shorter runs want 0.1."""
    max_skipped: PositiveInt = 100
    """Consecutive steps with a non-finite gradient after which a student is rolled back or given up."""
    init: str = ""
    """Weights to begin with instead of random ones, as when fine-tuning: a run folder with each of the
    students, or one student's folder or file. Copied when a student begins, and not read again."""
    rollbacks: NonNegativeInt = 1
    """How often a student with non-finite gradients goes back to its last healthy checkpoint, with half its
    learning rate, before it is given up; the other students train on."""
    watchdog_seconds: PositiveNumber = 1_800.0
    """Seconds without a completed step, validation or save after which a rank writes its stacks to the logs
    and ends; increase it if one validation takes longer."""


@dataclass
class ValidConfig:
    """Validation on held-out clips."""

    clips: NonNegativeInt = 64
    """Largest number of clips scored at a validation; 0 scores all."""
    max_seconds: NonNegativeNumber = 10.0
    """Longest part of a clip that is scored, in seconds."""
    best: Literal["pesq_wb", "stoi", "si_sdr"] = "pesq_wb"
    """Score (higher is better) that picks each student's best checkpoint."""


@dataclass
class TrackConfig:
    """Weights & Biases; the JSONL record in the run folder is written with or without it."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: WANDB_MODE where it is set, else online where credentials exist, else offline."""
    project: str = "mvat_dist"
    entity: str = ""
    group: str = ""
    """Group of the students' runs at W&B; empty: WANDB_RUN_GROUP where it is set, else the run's name."""
    every: PositiveInt = 10
    """Optimiser steps between two rows of the record."""
    examples: NonNegativeInt = 2
    """Validation clips whose audio and spectrograms are kept: noisy, clean, teacher, student."""
    artifacts: bool = False
    """Upload each student's best weights to W&B whenever they improve."""
    objective: str = ""
    """In a sweep: the student whose run is the sweep's, and whose scores decide; empty: the first one."""


@dataclass
class Config:
    """Everything that `mvat_dist.train` needs to know."""

    student: str = "all"
    """Comma-separated names from the table of sizes (or from `sizes`), or `all`."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sizes: dict[str, Size] = field(default_factory=dict)
    """Sizes of your own, by name."""
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    valid: ValidConfig = field(default_factory=ValidConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of the order and mixing of the data."""
    runs: str = "runs"
    """Folder in which the run's own folder is made."""
    name: str = ""
    """Name of the run folder; empty: what is trained plus a hash of what matters."""
    resume: Literal["auto", "must", "never"] = "auto"
    """`auto` continues where a checkpoint is found, `must` fails without one, `never` refuses one."""
