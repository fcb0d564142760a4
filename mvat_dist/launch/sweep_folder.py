"""The folder of a sweep without a server: its trials' names, files, states, scores and ranking."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from mvat_dist.launch import bayes, sweep_file, trials
from mvat_dist.launch.sweep_file import Point, Sweep
from mvat_dist.launch.trials import TrialRecord
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History


@dataclass(frozen=True)
class SweepFolder:
    """A sweep and the folder of its trials; the same file and seed mean the same folder."""

    sweep: Sweep
    seed: int
    path: Path

    @classmethod
    def of(cls, sweep: Sweep, seed: int, runs: Path) -> SweepFolder:
        """The folder below `runs`; it need not be there yet."""
        return cls(sweep, seed, runs.absolute() / f"sweep-{sweep.fingerprint}-{seed}")

    def run_id(self, number: int) -> str:
        """Name of a trial's run folder, and id of its W&B run."""
        return f"{self.path.name}-{number:04}"

    def parameters_file(self, number: int) -> Path:
        """The file that tells the trial its parameters."""
        return self.path / f"config-{self.run_id(number)}.yaml"

    def record_file(self, number: int) -> Path:
        """The file into which the trial writes its record."""
        return self.path / f"trial-{self.run_id(number)}.json"

    def record(self, number: int) -> TrialRecord | None:
        """What the trial has written down; None before it has."""
        return TrialRecord.read(self.record_file(number))

    def environment(self, number: int) -> dict[str, str]:
        """Variables of a trial's process: without WANDB_SWEEP_ID, as no server knows this sweep."""
        variables = {name: value for name, value in os.environ.items() if name not in trials.AGENT_VARIABLES}
        variables |= {
            "WANDB_RUN_ID": self.run_id(number),
            "WANDB_SWEEP_PARAM_PATH": str(self.parameters_file(number)),
            "WANDB_RUN_GROUP": self.path.name,
            trials.RECORD: str(self.record_file(number)),
        }
        variables.setdefault("WANDB_MODE", "offline")
        return variables

    def point(self, number: int) -> Point | None:
        """The trial's point, as its file has it; None of a Bayesian search before the trial is to start."""
        file = self.parameters_file(number)
        if file.exists():
            return trials.read_parameters(file)
        return None if self.sweep.method == "bayes" else self.sweep.point(number, self.seed)

    def choose(self, number: int) -> Point:
        """The point of a trial that is about to start, written where the trial reads it.

        Raises:
            UserError: a Bayesian search, and Optuna is not installed.
        """
        point = self.point(number)
        if point is None:
            point = bayes.propose(self.sweep, self.path, self.seed, number, self._results())
        trials.write_parameters(self.parameters_file(number), point)
        return point

    def state(self, number: int) -> str:
        """The state of the trial's run; without a run `failed` where its process failed, else `new`."""
        record = self.record(number)
        if record is None:
            return "new"
        status = RunDir(Path(record.run)).read_status()
        return str(status.get("state", "failed" if record.exit_code else "new"))

    def score(self, number: int) -> tuple[float | None, int | None]:
        """The last value of the metric, as in W&B's summary, and its step."""
        if record := self.record(number):
            for row in reversed(History(RunDir(Path(record.run)).history(record.student)).rows()):
                if isinstance(value := row.get(self.sweep.metric), (int, float)):
                    return value, row["step"]
        return None, None

    def ranking(self, count: int) -> str:
        """The first `count` trials as a table, the best first and those without a score last."""
        sign = -1 if self.sweep.goal == "maximize" else 1
        scores = {number: self.score(number) for number in range(count)}
        order = sorted(scores, key=lambda n: (scores[n][0] is None, sign * (scores[n][0] or 0.0)))
        states = {number: self.state(number) for number in order}
        rows = [[number, *scores[number], states[number], self._described(number)] for number in order]
        headers = ["trial", f"{self.sweep.metric} {'↑' if sign < 0 else '↓'}", "step", "state", "parameters"]
        table = tabulate(rows, headers, floatfmt=".4g", missingval="-", tablefmt="github")
        best = self.record(order[0])
        if best and scores[order[0]][0] is not None:
            return f"{table}\nbest: {RunDir(Path(best.run)).weights(best.student, 'best')}"
        if "finished" in states.values():
            print(
                f"no finished trial has logged {self.sweep.metric!r}: "
                "is it the name of a score in history.jsonl?",
                file=sys.stderr,
            )
        return table

    def _described(self, number: int) -> str | None:
        point = self.point(number)
        return None if point is None else sweep_file.describe(point)

    def _results(self) -> dict[int, float | None]:
        """The metric of each trial that has ended; None where it failed, as one whose loss diverged."""
        results: dict[int, float | None] = {}
        for file in self.path.glob("trial-*.json"):
            number = int(re.sub(r".*-(\d+)\.json", r"\1", file.name))
            record, state = self.record(number), self.state(number)
            if record and state in {"finished", "failed"}:
                students = RunDir(Path(record.run)).read_status().get("students", {})
                failed = state == "failed" or students.get(record.student, {}).get("given_up")
                results[number] = None if failed else self.score(number)[0]
        return results
