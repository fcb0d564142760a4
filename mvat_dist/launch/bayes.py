"""Propose the points of ``method: bayes`` without a server, by Optuna's TPE.

The study is a journal file in the sweep's folder, which all processes of a sweep share. TPE works on the
quantiles of the parameters' distributions, so that any distribution is its own prior. A proposal depends on
the seed, the trial's number and the trials that have ended: a sweep whose trials run one after the other is
the same after a kill as without.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from mvat_dist.errors import UserError
from mvat_dist.io import make_folder
from mvat_dist.launch.distributions import Distribution
from mvat_dist.launch.sweep_file import Point, Sweep

if TYPE_CHECKING:
    import optuna

_NUMBER = "trial"
"""Attribute of Optuna's trials: the number of ours. Optuna's own differs where tasks of an array start in
another order."""


def check_installed() -> None:
    """Refuse a Bayesian search where Optuna is missing.

    Raises:
        UserError: with how to install it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "method bayes without a W&B server needs Optuna: pip install 'mvat_dist[sweeps]', "
            "or choose method random"
        )


def propose(sweep: Sweep, folder: Path, seed: int, number: int, results: Mapping[int, float | None]) -> Point:
    """The point of a trial, the same whenever it is asked for again.

    Args:
        sweep: the file.
        folder: the sweep's folder, which holds the study.
        seed: the search's seed.
        number: the trial's number, from 0.
        results: the metric of each trial that has ended, by number; None for one that has failed.

    Raises:
        UserError: Optuna is not installed.
    """
    check_installed()
    make_folder(folder)
    journal = folder / "optuna.jsonl"
    lock = FileLock(f"{journal}.lock")
    with lock:
        study = _open(journal, lock, sweep, _generator_seed(seed, number))
        _tell(study, results)
        trial = _latest(study).get(number)
        params = trial.params if trial else _ask(study, sweep, number)
    return sweep.point_of(lambda name, parameter: _value(parameter, params[".".join(name)]))


def _open(journal: Path, lock: FileLock, sweep: Sweep, seed: int) -> optuna.Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _remove_torn_line(journal)
    # Optuna's own lock outlives a killed process for half a minute; this one ends with it.
    backend = JournalFileBackend(str(journal), lock_obj=lock)  # type: ignore[arg-type]
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        sampler=optuna.samplers.TPESampler(seed=seed),
        study_name=sweep.fingerprint,
        direction=sweep.goal,
        load_if_exists=True,
    )


def _generator_seed(seed: int, number: int) -> int:
    """A seed for each trial: processes of one seed would all propose the same points."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _remove_torn_line(journal: Path) -> None:
    """Cut off the line that a crash of the machine left unfinished: Optuna would never read on."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    if not content.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _latest(study: optuna.Study) -> dict[int, optuna.trial.FrozenTrial]:
    """Optuna's trials by the number of ours; the later of two."""
    return {
        trial.user_attrs[_NUMBER]: trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs
    }


def _ask(study: optuna.Study, sweep: Sweep, number: int) -> dict[str, Any]:
    """TPE's choice by dotted name: a quantile, or the index into a list of values."""
    trial = study.ask({".".join(name): _space(each) for name, each in sweep.parameters.items()})
    # Last: a trial without this attribute belongs to a process that was killed here.
    trial.set_user_attr(_NUMBER, number)
    return trial.params


def _space(parameter: Distribution) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if parameter.ordered:
        return FloatDistribution(0.0, 1.0)
    return CategoricalDistribution(tuple(range(len(parameter.choices or ()))))


def _value(parameter: Distribution, proposed: float) -> Any:
    if parameter.ordered:
        return parameter.quantile(min(proposed, math.nextafter(1.0, 0.0)))
    assert parameter.choices is not None
    return parameter.choices[int(proposed)]


def _tell(study: optuna.Study, results: Mapping[int, float | None]) -> None:
    """Report the trials that have ended since."""
    import optuna
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False):
        if not trial.user_attrs and not trial.state.is_finished():
            study.tell(trial.number, state=TrialState.FAIL)
    for number, trial in _latest(study).items():
        if number not in results:
            continue
        value = results[number]
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, value, state=None if value is not None else TrialState.FAIL)
        elif trial.state == TrialState.FAIL and value is not None:  # it was started again and has finished
            again = optuna.trial.create_trial(
                params=trial.params,
                distributions=trial.distributions,
                value=value,
                user_attrs=trial.user_attrs,
            )
            study.add_trial(again)
