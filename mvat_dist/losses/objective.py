"""A student's whole loss: L = L_enhance + mu * L_output + lambda * L_MVAT, by the chosen method.

L_enhance may include further distances, chosen by options, that a lower level does not reduce: of waveforms,
of compressed spectra, and of loudness as PESQ models it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mvat_dist.config.schema import DistilConfig, LossConfig
from mvat_dist.config.sizes import Size, ViewKey
from mvat_dist.losses.enhancement import (
    CompressedLoss,
    CompressedTargets,
    EnhancementLoss,
    OutputLoss,
    OutputTargets,
    Targets,
    WaveformLoss,
)
from mvat_dist.losses.mvat import Maps, energy_map, mvat_loss, shared_blocks
from mvat_dist.losses.pesq import PesqLoss, PesqTargets

_enhancement, _output, _waveform = EnhancementLoss(), OutputLoss(), WaveformLoss()
_compressed, _pesq = CompressedLoss(), PesqLoss()


@dataclass(frozen=True)
class BatchTargets:
    """What the losses of all students need of one batch."""

    enhancement: Targets
    compressed: CompressedTargets | None
    """None where that loss is not used."""
    pesq: PesqTargets | None
    """None where that loss is not used, or not yet."""
    output: OutputTargets | None
    """None where the method does not distil the output, or the teacher was not asked."""
    maps: Maps | None
    """The teacher's energy maps; None where it was not asked."""

    @property
    def noisy(self) -> Tensor:
        """(B, T), full scale 1: the students' input."""
        return self.enhancement.noisy


def prepare_targets(
    noisy: Tensor,
    clean: Tensor,
    teacher_maps: Maps | None = None,
    teacher_output: Tensor | None = None,
    *,
    config: LossConfig | None = None,
    pesq: bool = True,
) -> BatchTargets:
    """Compute the targets of one batch, once for all students.

    Args:
        noisy: (B, T), full scale 1.
        clean: (B, T), the speech in it.
        teacher_maps: energy maps (B, T_b) by (side, level, view).
        teacher_output: (B, T), where the method distils it.
        config: the students' own loss; by default the authors' alone.
        pesq: whether the differentiable PESQ, if it is used at all, is already part of the loss.
    """
    config = config or LossConfig()
    return BatchTargets(
        enhancement=_enhancement.prepare(noisy, clean),
        compressed=_compressed.prepare(noisy, clean) if config.compressed else None,
        pesq=_pesq.prepare(noisy, clean) if config.pesq and pesq else None,
        output=None if teacher_output is None else _output.prepare(teacher_output),
        maps=teacher_maps,
    )


class Objective:
    """The loss of one student beside one teacher."""

    def __init__(
        self, distil: DistilConfig, student: Size, teacher: Size | None, loss: LossConfig | None = None
    ) -> None:
        """Choose the terms; `loss` is the student's own loss, by default the authors' alone.

        Raises:
            UserError: attention transfer, but the two networks have no multi-view block in common.
        """
        self._distil = distil
        self._loss = loss = loss or LossConfig()
        self._betas = distil.view_betas
        self.keys: list[ViewKey] = []
        """(side, level, view) of every attention-transfer term, in the network's order."""
        if "mvat" in distil.method:
            assert teacher is not None, "the configuration's check asks for a teacher"
            blocks = shared_blocks(student, teacher)
            self.keys = [(*block, view) for block in blocks for view, beta in self._betas.items() if beta]
        self.terms: tuple[str, ...] = (
            "loss",
            "enhance",
            *(["waveform"] if loss.waveform else []),
            *(["compressed"] if loss.compressed else []),
            *(["pesq"] if loss.pesq else []),
            *(["output"] if "output" in distil.method else []),
            *(["mvat"] if self.keys else []),
            *(_term_name(key) for key in self.keys),
        )
        """Names of what a call returns."""

    def __call__(
        self,
        enhanced: Tensor,
        views: Mapping[ViewKey, Tensor],
        targets: BatchTargets,
        kd_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """Every term of `terms` that `targets` has a target for, each (); ``loss`` is the sum to minimise.

        Args:
            enhanced: the student's output (B, T).
            views: its view features (B, n, T_b).
            targets: of the same batch, from `prepare_targets`.
            kd_weight: factor of lambda and mu at this step, 0 to 1; the terms themselves stay as they are.
        """
        own, distil = self._loss, self._distil
        terms = {"enhance": _enhancement(enhanced, targets.enhancement)}
        loss = terms["enhance"]
        if own.waveform:
            terms["waveform"] = _waveform(enhanced, targets.enhancement)
            loss = loss + own.waveform * terms["waveform"]
        if targets.compressed is not None:
            terms["compressed"] = _compressed(enhanced, targets.compressed)
            loss = loss + own.compressed * terms["compressed"]
        if targets.pesq is not None:
            terms["pesq"] = _pesq(enhanced, targets.pesq)
            loss = loss + own.pesq * terms["pesq"]
        if targets.output is not None:
            terms["output"] = _output(enhanced, targets.output)
            loss = loss + kd_weight * distil.output_weight * terms["output"]
        if self.keys and targets.maps is not None:
            maps = {key: energy_map(views[key]) for key in self.keys}
            terms["mvat"], by_key = mvat_loss(maps, targets.maps, self._betas)
            terms |= {_term_name(key): term for key, term in by_key.items()}
            loss = loss + kd_weight * distil.weight * terms["mvat"]
        terms["loss"] = loss
        missing = set(self.terms) - terms.keys() - {"pesq"}
        assert not kd_weight or not missing, f"no target for {missing}"
        return terms


def _term_name(key: ViewKey) -> str:
    side, level, view = key
    return f"mvat/{side}/{level}/{view}"
