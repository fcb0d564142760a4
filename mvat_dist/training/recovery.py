"""Students in trouble: rolled back by rule, then given up, while the others train on."""

from __future__ import annotations

import logging

from mvat_dist.config.schema import Config
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError
from mvat_dist.runs.folder import RunDir
from mvat_dist.training import setup
from mvat_dist.training.students import Fleet

logger = logging.getLogger(__name__)


def relieve(fleet: Fleet, config: Config, run: RunDir, ranks: Ranks) -> None:
    """Help the students without a finite gradient in the last ``train.max_skipped`` steps.

    Such a student goes back to the last checkpoint that it was well in, with half its learning rate, as often
    as ``train.rollbacks`` says; then it is given up. The gradients are the ranks' sums, so all ranks agree.

    Raises:
        UserError: no student is left.
    """
    train = config.train
    for student in fleet.stepped:
        if student.progress.skipped_in_a_row < train.max_skipped:
            continue
        if student.progress.rollbacks < train.rollbacks:
            state = setup.healthy_state(run, config, student.name, ranks)
            student.roll_back(state)
            place = f"as it was after step {state.progress['steps']}" if state.progress else "as it began"
            told = f"goes on {place} with {student.progress.lr_factor:g} of its learning rate"
        else:
            student.progress.given_up = True
            told = "is given up, the others go on"
        if ranks.rank == 0:
            logger.warning(
                "step %d: %s %s, after %d steps without a finite gradient",
                *(student.progress.steps, student.name, told, train.max_skipped),
            )
    refuse_if_hopeless(fleet, config, run, ranks)


def refuse_if_hopeless(fleet: Fleet, config: Config, run: RunDir, ranks: Ranks) -> None:
    """Refuse to go on where every student was given up.

    Raises:
        UserError: that is so.
    """
    if all(student.progress.given_up for student in fleet.students):
        raise UserError(
            f"every student of {run.path} was given up after {config.train.max_skipped} steps in a row with "
            "a non-finite gradient: lower --optim.lr or look at the data",
            say=ranks.rank == 0,
        )
