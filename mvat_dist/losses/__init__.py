"""What a student minimises: the enhancement loss, output distillation and attention transfer."""

from mvat_dist.losses.compressed import CompressedLoss
from mvat_dist.losses.enhancement import EnhancementLoss, OutputLoss, WaveformLoss
from mvat_dist.losses.mvat import energy_map, mvat_loss, shared_blocks
from mvat_dist.losses.objective import Lesson, Objective, Prepared
from mvat_dist.losses.pesq import PesqLoss

__all__ = [
    "CompressedLoss",
    "EnhancementLoss",
    "Lesson",
    "Objective",
    "OutputLoss",
    "PesqLoss",
    "Prepared",
    "WaveformLoss",
    "energy_map",
    "mvat_loss",
    "shared_blocks",
]
