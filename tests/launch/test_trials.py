"""How a trial reads its agent: values in any form, the place of its runs, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb.sdk.lib.config_util import dict_from_config_file, save_config_file_from_dict

from mvat_dist.config import parser
from mvat_dist.errors import UserError
from mvat_dist.launch import sweep_file, trials
from mvat_dist.launch.trials import Trial
from tests.conftest import REPOSITORY

FIXED = ["--config=configs/distil.yaml", "--distil.method=none", "--optim.lr=0.5", "--student=manner-s-0.6gf"]
FORMS = (
    "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_append_hydra",
    "args_override_hydra",
)  # fmt: skip

numbers = st.floats(1e-12, 1e12) | st.integers(1, 10**6)
shares = st.floats(0, 1, exclude_max=True)
names = st.text(st.characters(blacklist_categories=["C", "Z"]), min_size=1, max_size=20)
parameters = st.fixed_dictionaries(
    {},
    optional={
        "optim.lr": numbers,
        "optim.betas": st.lists(shares, min_size=2, max_size=2),
        "engine": st.fixed_dictionaries({"freeze_batchnorm": st.booleans()}),
        "engine.sync_batchnorm": st.booleans(),
        "distil": st.fixed_dictionaries({"weight": numbers, "beta_local": numbers}),
        "valid.best": st.sampled_from(["stoi", "si_sdr"]),
        "track.project": names.map(lambda name: f"p{name}"),
        "_wandb": st.just({"t": 1}),
    },
)


def environment(file: Path | None, **more: str) -> dict[str, str]:
    named = {"WANDB_RUN_ID": "r1", "WANDB_SWEEP_ID": "s1", **more}
    return named | ({"WANDB_SWEEP_PARAM_PATH": str(file)} if file else {})


def expected(sent: dict[str, Any]) -> dict[str, Any]:
    """Every key of the configuration that the agent means, flat."""
    flat: dict[str, Any] = {}
    for name, value in sent.items():
        if name != "_wandb":
            flat |= (
                {f"{name}.{key}": each for key, each in value.items()}
                if isinstance(value, dict)
                else {name: value}
            )
    return flat


def value(config: Any, name: str) -> Any:
    for step in name.split("."):
        config = getattr(config, step)
    return list(config) if isinstance(config, tuple) else config


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parameters") / "config-r1.yaml"


@settings(max_examples=20)  # the parser is slow
@given(sent=parameters, form=st.sampled_from(FORMS))
def test_values_arrive_as_they_were_sent(file: Path, sent: dict[str, Any], form: str) -> None:
    """Written and spelled by W&B's own code, read by ours."""
    wrapped = {name: {"value": sent_value} for name, sent_value in sent.items()}
    save_config_file_from_dict(str(file), wrapped)
    spelled = create_sweep_command_args({"args": wrapped})[form]
    arguments, config = Trial.read(environment(file)).arguments([*FIXED, *spelled])
    for name, sent_value in expected(sent).items():
        assert value(config, name) == sent_value
        assert isinstance(value(config, name), type(sent_value)) or isinstance(sent_value, int)
    assert (config.name, Path(config.runs).name) == ("r1", "sweep-s1")
    # What the ranks are told means the same.
    again = dataclasses.replace(parser.parse(arguments), runs=config.runs)
    assert again == config


@settings(max_examples=20)
@given(sent=parameters.filter(lambda sent: "_wandb" not in sent))
def test_without_the_agents_file_the_arguments_are_enough(sent: dict[str, Any]) -> None:
    spelled = create_sweep_command_args(
        {"args": {name: {"value": sent_value} for name, sent_value in sent.items()}}
    )["args"]
    _, config = Trial.read(environment(None)).arguments([*FIXED, *spelled])
    for name, sent_value in expected(sent).items():
        assert value(config, name) == sent_value


@given(sent=parameters)
def test_our_file_is_as_wandbs(file: Path, sent: dict[str, Any]) -> None:
    trials.write_parameters(file, sent)
    assert dict_from_config_file(str(file)) == sent == trials.read_parameters(file)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"optim.lrr": 1e-3}, "did you mean 'optim.lr'"),
        ({"optim": {"lrr": 1e-3}}, "did you mean 'optim.lr'"),
        ({"lr": 1e-3}, "optim.lr"),
        ({"optim.lr": "fast"}, "expected a finite number"),
        ({"optim.lr": -1.0}, "above 0"),
        ({"name": "mine"}, "leave --name out"),
        ({"track.objective": "manner-s-0.9gf"}, "none of the students.*manner-s-0.6gf"),
    ],
)
def test_what_the_trainer_does_not_know_is_refused(tmp_path: Path, sent: dict[str, Any], words: str) -> None:
    trials.write_parameters(tmp_path / "p.yaml", sent)
    with pytest.raises(UserError, match=words):
        Trial.read(environment(tmp_path / "p.yaml")).arguments(FIXED)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WANDB_RUN_ID": ""}, "no trial of a sweep.*wandb agent"),
        ({"WANDB_SWEEP_ID": ""}, "no trial of a sweep"),
        ({"WANDB_RUN_ID": "../r1"}, "cannot name a folder"),
        ({"WANDB_SWEEP_PARAM_PATH": "/nowhere/p.yaml"}, "cannot be read from /nowhere"),
    ],
)
def test_who_is_no_trial_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Trial.read({**environment(None), **changes})


def test_the_first_student_decides_unless_another_is_named() -> None:
    both = [*FIXED, "--student=manner-s-0.9gf,manner-s-0.6gf"]
    for more, student in (([], "manner-s-0.9gf"), (["--track.objective=manner-s-0.6gf"], "manner-s-0.6gf")):
        arguments, config = Trial.read(environment(None)).arguments([*both, *more])
        assert config.track.objective == parser.parse(arguments).track.objective == student


def test_its_runs_belong_where_the_sweep_is() -> None:
    """Also when they are sent later, by a command that no agent has told anything."""
    variables = {"WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team", "WANDB_RUN_GROUP": "a-sweep"}
    arguments, config = Trial.read(environment(None, **variables)).arguments([*FIXED, "--track.project=ours"])
    for track in (config.track, parser.parse(arguments).track):
        assert (track.project, track.entity, track.group) == ("theirs", "team", "a-sweep")


@pytest.mark.parametrize("number", range(3))
def test_the_shipped_sweep_means_trainings(tmp_path: Path, number: int) -> None:
    shipped = sweep_file.read(REPOSITORY / "configs" / "sweep.yaml")
    point = shipped.point(number, seed=0)
    trials.write_parameters(tmp_path / "p.yaml", point)
    given = [
        part for part in shipped.command[shipped.command.index("mvat_dist.trial") + 1 :] if part != "${args}"
    ]
    _, config = Trial.read(environment(tmp_path / "p.yaml")).arguments(given)
    assert config.optim.lr == point["optim.lr"]
    assert config.distil.method == point["distil.method"]
    assert config.track.objective == config.student
