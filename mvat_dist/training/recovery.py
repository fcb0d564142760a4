"""Roll back a student whose gradients are no longer finite, or give it up, while the others train on."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mvat_dist.config.schema import TrainConfig
from mvat_dist.distributed.collectives import broadcast_object, rank, run_on_all_ranks, run_on_rank_zero
from mvat_dist.errors import UserError
from mvat_dist.runs.folder import RunDir
from mvat_dist.training import checkpoint
from mvat_dist.training.checkpoint import StudentState
from mvat_dist.training.hooks import StepEnd
from mvat_dist.training.students import Student, StudentGroup

logger = logging.getLogger(__name__)


class Recovery:
    """Helps students without a finite gradient in the last ``train.max_skipped`` steps.

    Such a student goes back to the last checkpoint that it was well in, with half its learning rate, as often
    as ``train.rollbacks`` says; then it is given up. Gradients are averages over the ranks: all agree.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDir,
        students: StudentGroup,
        first_state: Callable[[str], StudentState],
    ) -> None:
        """`first_state` gives the state in which a student began, for one that was never well since."""
        self._config = config
        self._run = run
        self._students = students
        self._first_state = first_state

    def due(self, end: StepEnd) -> bool:
        """Whether a student that made the last step needs help; the same on every rank."""
        del end
        return any(self._is_stuck(student) for student in self._students.active)

    def run(self, end: StepEnd) -> None:
        """Roll back or give up every student that is stuck. Every rank must call it.

        Raises:
            UserError: no student is left.
        """
        del end
        for student in filter(self._is_stuck, self._students.active):
            outcome = self._help(student)
            if rank() == 0:
                logger.warning(
                    "step %d: %s %s, after %d steps without a finite gradient",
                    *(student.progress.steps, student.name, outcome, self._config.max_skipped),
                )
        self.check_any_student_left()

    def check_any_student_left(self) -> None:
        """Refuse to go on where every student was given up.

        Raises:
            UserError: that is so.
        """
        if all(student.progress.given_up for student in self._students.students):
            raise UserError(
                f"every student of {self._run.path} was given up after {self._config.max_skipped} steps in a "
                "row with a non-finite gradient: lower --optim.lr or look at the data",
                say=rank() == 0,
            )

    def _is_stuck(self, student: Student) -> bool:
        progress = student.progress
        return progress.skipped_in_a_row >= self._config.max_skipped and not progress.given_up

    def _help(self, student: Student) -> str:
        """Roll the student back or give it up; returns what was done, in words."""
        if student.progress.rollbacks >= self._config.rollbacks:
            student.progress.given_up = True
            return "is given up, the others go on"
        saved = self._last_healthy_state(student.name)
        student.roll_back(saved or self._first_state(student.name))
        place = f"as it was after step {saved.progress.steps}" if saved else "as it began"
        return f"goes on {place} with {student.progress.lr_factor:g} of its learning rate"

    def _last_healthy_state(self, name: str) -> StudentState | None:
        """The student from the newest checkpoint in which its last gradient was finite, if there is one."""
        folder = self._run.checkpoints
        path = broadcast_object(
            run_on_rank_zero(lambda: checkpoint.newest(folder, lambda p: checkpoint.is_well(p, name)))
        )
        # On all ranks at once: the next save removes checkpoints, and no rank may still be reading one.
        return run_on_all_ranks(lambda: checkpoint.load(path, name) if path else None)
