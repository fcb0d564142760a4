"""MANNER: one implementation for base and small, for teacher and students."""

from mvat_dist.models.checkpoint import load_manner_checkpoint
from mvat_dist.models.manner import Manner, build

__all__ = ["Manner", "build", "load_manner_checkpoint"]
