"""Multi-view attention transfer: the student learns where in time each of the teacher's views is active.

Shin et al., "Multi-View Attention Transfer for Efficient Speech Enhancement" (arXiv 2208.10367), after
Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017). No parameter is added, and
widths may differ: a map has no channel axis. Design choices: where a view's feature is taken (see
`MultiViewBlock`), maps of summed squares, the squared L2 distance, and cropping to the shorter map.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat_dist.config.sizes import Side, Size, View, ViewKey
from mvat_dist.errors import UserError
from mvat_dist.losses.stft import full_precision

Maps = dict[ViewKey, Tensor]
"""Energy maps (B, T_b) by (side, level, view)."""

NORM_FLOOR = 1e-12
"""Least 2-norm that a map is divided by: a map of zeros stays zero, and so does its gradient."""


def energy_map(feature: Tensor) -> Tensor:
    """Sum over channels of the squared view feature: (B, n, T) -> (B, T), float32 (float64 stays)."""
    return full_precision(feature).square().sum(1)


def shared_blocks(student: Size, teacher: Size) -> list[tuple[Side, int]]:
    """(side, level) of the multi-view blocks that both networks have.

    Raises:
        UserError: there is none, so attention transfer is impossible.
    """
    blocks = [block for block in student.blocks() if block in teacher.blocks()]
    if not blocks:
        raise UserError(
            f"student ({student.kind}, depth {student.depth}) and teacher ({teacher.kind}, depth "
            f"{teacher.depth}) have no multi-view block at the same level: take a base teacher of at "
            f"least the student's depth, or distil by 'output' or 'none'"
        )
    return blocks


def mvat_loss(
    student_maps: Mapping[ViewKey, Tensor],
    teacher_maps: Mapping[ViewKey, Tensor],
    betas: Mapping[View, float],
) -> tuple[Tensor, Maps]:
    """Distance between the energy maps of student and teacher; lower is better, 0 is equal.

    Per block that both have, and view: both maps are cropped to the shorter, each item is divided by
    its 2-norm, and the squared L2 distance of the two is averaged over items.

    Args:
        student_maps: (B, T_b) by (side, level, view).
        teacher_maps: the same; no gradient flows into them.
        betas: factor of each view's terms; a view with 0, or not named, is not computed.

    Returns:
        The sum of the terms times their factors, (), and the terms themselves, each in [0, 2].
        A map of zeros (silence) has no direction: it is 0 from another and 1 from any other map.

    Raises:
        ValueError: no map is in both with a factor other than 0.
    """
    keys = [key for key in student_maps if key in teacher_maps and betas.get(key[2], 0) != 0]
    if not keys:
        raise ValueError("student and teacher share no energy map of a view with a factor other than 0")
    terms = {key: _distance(student_maps[key], teacher_maps[key].detach()) for key in keys}
    total = torch.stack([betas[key[2]] * term for key, term in terms.items()]).sum()
    return total, terms


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    frames = min(student.shape[-1], teacher.shape[-1])
    # A teacher's map may come from a cache in half precision, in which squares would overflow.
    difference = _unit(student[..., :frames]) - _unit(teacher[..., :frames].to(student.dtype))
    return difference.square().sum(-1).mean()


def _unit(maps: Tensor) -> Tensor:
    return F.normalize(maps, dim=-1, eps=NORM_FLOOR)
