"""A student's whole loss: L = L_enhance + mu * L_output + lambda * L_MVAT, by the chosen method.

Where asked for, distances that no level makes small are added to the first: of waveforms, of compressed
spectra, of what PESQ hears.
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


@dataclass(frozen=True)
class Prepared:
    """Everything of one batch that is the same for every student."""

    targets: Targets
    compressed: CompressedTargets | None
    pesq: PesqTargets | None
    """None too where it does not count yet."""
    output: OutputTargets | None
    maps: Maps | None
    """None where the teacher was not asked."""


class Objective:
    """The loss of one student beside one teacher."""

    def __init__(
        self, config: DistilConfig, student: Size, teacher: Size | None, own: LossConfig | None = None
    ) -> None:
        """Choose the terms; `own` says what the student's own loss is, by default the authors' alone.

        Raises:
            UserError: attention transfer, but the two networks have no multi-view block in common.
        """
        self._config = config
        self._own = own = own or LossConfig()
        self._enhancement, self._output = EnhancementLoss(), OutputLoss()
        self._waveform, self._compressed, self._pesq = WaveformLoss(), CompressedLoss(), PesqLoss()
        self._betas = config.view_betas
        self.keys: list[ViewKey] = []
        """(side, level, view) of every attention-transfer term, in the network's order."""
        if "mvat" in config.method:
            assert teacher is not None, "the configuration's check asks for a teacher"
            blocks = shared_blocks(student, teacher)
            self.keys = [(*block, view) for block in blocks for view, beta in self._betas.items() if beta]
        self.terms: tuple[str, ...] = (
            "loss",
            "enhance",
            *(["waveform"] if own.waveform else []),
            *(["compressed"] if own.compressed else []),
            *(["pesq"] if own.pesq else []),
            *(["output"] if "output" in config.method else []),
            *(["mvat"] if self.keys else []),
            *(_term_name(key) for key in self.keys),
        )
        """Names of what a call returns."""

    def prepare(
        self,
        noisy: Tensor,
        clean: Tensor,
        teacher_maps: Maps | None = None,
        teacher_output: Tensor | None = None,
        *,
        pesq: bool = True,
    ) -> Prepared:
        """Compute the targets of one batch, which all students share.

        Args:
            noisy: (B, T), full scale 1.
            clean: (B, T), the speech in it.
            teacher_maps: energy maps (B, T_b); None where the teacher counts for nothing at this step.
            teacher_output: (B, T); None where the method does not distil it, or where the maps are None.
            pesq: whether the differentiable PESQ counts at this step.
        """
        return Prepared(
            targets=self._enhancement.prepare(noisy, clean),
            compressed=self._compressed.prepare(noisy, clean) if self._own.compressed else None,
            pesq=self._pesq.prepare(noisy, clean) if self._own.pesq and pesq else None,
            output=None if teacher_output is None else self._output.prepare(teacher_output),
            maps=teacher_maps,
        )

    def __call__(
        self, estimate: Tensor, views: Mapping[ViewKey, Tensor], prepared: Prepared, kd_weight: float = 1.0
    ) -> dict[str, Tensor]:
        """Every term of `terms` that `prepared` has targets for, each (); ``loss`` is the sum to minimise.

        Args:
            estimate: the student's output (B, T).
            views: its view features (B, n, T_b).
            prepared: from `prepare`, of this or another student's objective of the same fleet.
            kd_weight: factor of lambda and mu at this step, 0 to 1; the terms themselves stay as they are.
        """
        found = {"enhance": self._enhancement(estimate, prepared.targets)}
        total = found["enhance"]
        if self._own.waveform:
            found["waveform"] = self._waveform(estimate, prepared.targets)
            total = total + self._own.waveform * found["waveform"]
        if prepared.compressed is not None:
            found["compressed"] = self._compressed(estimate, prepared.compressed)
            total = total + self._own.compressed * found["compressed"]
        if prepared.pesq is not None:
            found["pesq"] = self._pesq(estimate, prepared.pesq)
            total = total + self._own.pesq * found["pesq"]
        if prepared.output is not None:
            found["output"] = self._output(estimate, prepared.output)
            total = total + kd_weight * self._config.output_weight * found["output"]
        if self.keys and prepared.maps is not None:
            maps = {key: energy_map(views[key]) for key in self.keys}
            found["mvat"], terms = mvat_loss(maps, prepared.maps, self._betas)
            found |= {_term_name(key): term for key, term in terms.items()}
            total = total + kd_weight * self._config.weight * found["mvat"]
        return {"loss": total, **found}


def _term_name(key: ViewKey) -> str:
    side, level, view = key
    return f"mvat/{side}/{level}/{view}"
