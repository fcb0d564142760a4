"""The stand-in for the W&B server with one sweep, and agents that ask for its trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tests.wandb_server import Run, Server, Variables

SWEEP = "sw33p1d0"


class SweepServer(Server):
    """Gives the `points` one after the other to whoever asks; a preempted run goes before a new one."""

    def __init__(self, points: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.points = list(points)
        self.config: dict[str, Any] = {}
        """The sweep file as it came."""
        self.agents: list[str] = []
        self.given: list[tuple[str, str]] = []
        """Every ``run`` and ``resume`` that an agent was told, with the run's id."""
        self._arguments: dict[str, dict[str, Any]] = {}
        self.ending: set[str] = set()
        """Trials that the sweep wants to end: agents are told to stop them."""
        self.operations |= {
            "UpsertSweep": self._upsert_sweep,
            "SweepWithRuns": self._sweep_with_runs,
            "CreateAgent": self._create_agent,
            "Heartbeat": self._heartbeat,
        }

    def _upsert_sweep(self, variables: Variables) -> dict[str, Any]:
        self.config = yaml.safe_load(variables["config"])
        entity = {"id": "e", "name": variables["entityName"] or "e"}
        project = {"id": "p", "name": variables["projectName"], "entity": entity}
        sweep = {"id": "1", "name": SWEEP, "project": project}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _sweep_with_runs(self, variables: Variables) -> dict[str, Any]:
        assert variables["sweep"] == SWEEP
        sweep = {"id": "1", "name": SWEEP, "state": "RUNNING", "runs": {"edges": []}}
        return {"project": {"sweep": {**sweep, "config": yaml.safe_dump(self.config)}}}

    def _create_agent(self, variables: Variables) -> dict[str, Any]:
        self.agents.append(variables["host"])
        return {"createAgent": {"agent": {"id": f"agent-{len(self.agents)}"}}}

    def _heartbeat(self, variables: Variables) -> dict[str, Any]:
        running = json.loads(variables["runState"])
        if running:
            commands = [{"type": "stop", "run_id": run} for run in running if run in self.ending]
        else:
            commands = [self._next()]
        agent = {"id": variables["id"]}
        return {"agentHeartbeat": {"agent": agent, "commands": json.dumps(commands)}}

    def _next(self) -> dict[str, Any]:
        for run in self.runs.values():
            if run.sweep == SWEEP and run.preempting and run.complete and run.exit_code:
                run.preempting, run.complete, run.exit_code = False, False, None
                return self._start("resume", run)
        if not self.points:
            return {"type": "exit"}
        run = Run(f"tr1al{len(self.given)}", sweep=SWEEP)
        run.config = {name: {"value": value} for name, value in self.points.pop(0).items()}
        self.runs[run.name], self._arguments[run.name] = run, dict(run.config)
        return self._start("run", run)

    def _start(self, kind: str, run: Run) -> dict[str, Any]:
        self.given.append((kind, run.name))
        content = {"program": self.config["program"], "args": self._arguments[run.name]}
        return {"type": kind, "run_id": run.name, **content}
