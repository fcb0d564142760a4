"""Submitting without a cluster: what is refused, what a job's script holds, and that a run starts once."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mvat_dist import submit
from mvat_dist.config import parser, sizes
from mvat_dist.errors import UserError
from mvat_dist.launch import submission
from mvat_dist.launch.slurm import code_fingerprint
from mvat_dist.runs import folder as rundir
from mvat_dist.runs.folder import RunDir
from tests.submit_place import Program, programs_in, write_place

# What `scontrol ping` says on a machine with Slurm's packages and no configuration (22.05).
NO_CONFIGURATION = """\
scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host
scontrol: error: fetch_config: DNS SRV lookup failed
scontrol: error: _establish_config_source: failed to fetch config
scontrol: fatal: Could not establish a configuration source"""

REFUSAL = """\
sbatch: error: invalid partition specified: nope
sbatch: error: Batch job submission failed: Invalid partition name specified"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_place(tmp_path)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return programs_in(tmp_path / "bin", monkeypatch)


@pytest.fixture
def slurm(program: Program, tmp_path: Path) -> Path:
    """A cluster of shell scripts: it takes jobs, counts them, and calls each one pending for ever."""
    jobs = tmp_path / "jobs"
    program("srun", "exit 1")
    program("sacct", "exit 0")
    program("scontrol", 'echo "Slurmctld(primary) at here is UP"')
    program("sbatch", f'echo "$1" >> "{jobs}"; echo "Submitted batch job 7"')
    program("squeue", f'[ -e "{jobs}" ] && printf "PENDING\\tPriority\\tmvat-one\\n"')
    return jobs


COMMON = ("--distil.method=none", "--student=manner-s-0.6gf", "--data.train=corpus", "--name=one")


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    submit.main([*COMMON, "--dry-run", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], "--nodes 0: give at least 1"),
        (["--nodes", "-3"], "--nodes -3"),
        (["--nodes", "four"], "invalid int value: 'four'"),
        (["--tasks-per-node", "0"], "--tasks-per-node 0"),
        (["--gpus-per-node", "2", "--tasks-per-node", "4"], "every task needs a GPU of its own"),
        (["--nodes", "3"], "--train.batch 32 cannot be shared by 3 processes.*multiple of 3"),
        (["--time", "soon"], "--time 'soon'"),
        (["--student", "manner-s-5.2gf"], "manner-s-5.3gf"),
        (["--data.trian", "x"], "data.train"),
        (["--data.train", "nowhere"], "nowhere"),
        (["--data.train", "."], "packed corpus"),
        (
            ["--nodes=4", "--data.workers=7"],
            r"16 shards for 28 readers \(4 ranks x 7 workers\).*--min-shards",
        ),
        (["--data.reverb_probability=2"], "a share from 0 to 1"),
        (["--distil.method", "mvat", "--teacher", "nobody"], "no such teacher: .*nobody"),
        (["--cluster", "slurm"], "--cluster slurm: no Slurm here; choose --cluster local"),
        (["--cluster", "cloud"], "invalid choice: 'cloud'"),
        (["--slurm", "=x"], "--slurm '=x'"),
        (["--srun-args='open"], "--srun-args .*No closing quotation"),
        (["--slurm", "a b=x"], "--slurm 'a b=x'"),
        (["--name", "a/b"], "--name 'a/b'"),
    ],
)
@pytest.mark.usefixtures("program")
def test_mistakes_are_told_before_anything_starts(place: Path, arguments: list[str], words: str) -> None:
    files = tree(place)
    with pytest.raises(UserError, match=words):
        submit.main([*COMMON, *arguments])
    assert tree(place) == files


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition", "a\n#SBATCH --wrap=id"], "partition holds a line break"),
        (["--slurm", "comment=a\nid"], "comment holds a line break"),
        (["--runs", "100%"], "without %"),
        (["--runs", "a\nb"], "line breaks"),
    ],
)
def test_what_cannot_stand_in_a_script_is_refused(
    place: Path, slurm: Path, arguments: list[str], words: str
) -> None:
    files = tree(place)
    with pytest.raises(UserError, match=words):
        submit.main([*COMMON, *arguments])
    assert tree(place) == files
    assert not slurm.exists()


def test_one_line_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mvat_dist.submit", *COMMON, "--nodes=0"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --nodes 0: give at least 1\n"


def test_torch_is_not_needed_to_submit() -> None:
    code = "import sys; from mvat_dist import submit; submit.main(sys.argv[1:]); "
    code += "sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *COMMON, "--cluster=local", "--dry-run"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    place: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tree(place)
    output = plan(capsys, "--nodes=4", "--gpus-per-node=2", "--runs=my runs", "--time=2-00:00:00")
    assert tree(place) == files
    assert not slurm.exists()
    assert "manner-s-0.6gf" in output
    assert "4 nodes x 2 tasks, 2 GPUs per node: 4 of the 32 segments per process" in output
    flags = [line for line in output.splitlines() if line.startswith("#SBATCH")]
    log = """'"'"'""".join(f"{place}/my runs/one/submitit/%j_0_log.out".split("'"))
    assert flags == [
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --job-name=mvat-one",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output='{log}'",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --time=2880",
    ]
    assert "srun --unbuffered" in output


@pytest.mark.usefixtures("slurm")
def test_every_wish_reaches_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    wishes = {
        "partition": "gpu",
        "account": "me",
        "qos": "high",
        "mem": "64G",
        "constraint": "a100&ib",
        "exclude": "bad[1-3]",
        "wckey": "speech",
    }
    output = plan(
        capsys,
        *(f"--{key}={value}" for key, value in wishes.items()),
        "--slurm=mail-type=END",
        "--slurm=exclusive",
        "--signal-delay=300",
        "--setup=module load cuda",
        "--setup=echo $(hostname)",
        "--srun-args=--mpi=none --export='A B'",
    )
    for line in (
        *(
            f"#SBATCH --{key}={value}"
            for key, value in wishes.items()
            if key not in {"constraint", "exclude"}
        ),
        "#SBATCH --constraint='a100&ib'",
        "#SBATCH --exclude='bad[1-3]'",
        "#SBATCH --mail-type=END",
        "#SBATCH --exclusive",
        "#SBATCH --signal=USR2@300",
        "module load cuda",
        "echo $(hostname)",
    ):
        assert f"\n{line}\n" in output
    assert "--mpi=none '--export=A B'" in output


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "no Slurm here: 4 nodes x 1 task run as 4 local processes"),
        (f"cat >&2 <<'END'\n{NO_CONFIGURATION}\nEND\nexit 1", "no cluster is configured: 4 nodes"),
    ],
)
def test_auto_without_a_cluster_stays_here_and_says_so(
    program: Program, capsys: pytest.CaptureFixture[str], answer: str | None, words: str
) -> None:
    if answer:
        for name in ("sbatch", "srun", "scontrol"):
            program(name, answer)
    output = plan(capsys, "--nodes=4", "--partition=gpu")
    assert words in output
    assert "without Slurm these mean nothing: --partition" in output
    assert "#SBATCH" not in output


def test_auto_with_a_silent_cluster_does_not_train_on_the_login_node(program: Program) -> None:
    for name in ("sbatch", "srun", "scontrol"):
        program(name, 'echo "Slurmctld(primary) at here is DOWN"; exit 1')
    with pytest.raises(UserError, match=r"does not answer \(Slurmctld\(primary\) at here is DOWN\)"):
        submit.main([*COMMON])


@pytest.mark.usefixtures("slurm")
def test_a_refused_job_leaves_nothing_and_one_line(
    place: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    program("sbatch", f"cat >&2 <<'END'\n{REFUSAL}\nEND\nexit 1")
    files = tree(place)
    with pytest.raises(
        UserError,
        match="refused the job: invalid partition specified: nope; Batch job submission failed: Invalid",
    ):
        submit.main([*COMMON, "--partition=nope"])
    assert tree(place) == files
    assert capsys.readouterr().err == ""


def test_a_second_submission_finds_the_first(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit.main([*COMMON])
    first = capsys.readouterr().out
    assert "scancel 7" in first
    assert "tail -F" in first
    submit.main([*COMMON])
    assert "nothing new was submitted" in capsys.readouterr().out
    assert len(slurm.read_text().splitlines()) == 1
    # Nor does a local start run beside the job.
    with pytest.raises(SystemExit) as ended:
        submit.main([*COMMON, "--cluster=local"])
    assert ended.value.code == submission.EXIT_BUSY
    assert "squeue -j 7" in capsys.readouterr().out


def test_the_job_of_another_run_is_not_taken_for_ours(slurm: Path, program: Program) -> None:
    submit.main([*COMMON])
    program("squeue", 'printf "RUNNING\\tNone\\tsomebody-else\\n"')  # the number is in use again
    submit.main([*COMMON])
    assert len(slurm.read_text().splitlines()) == 2


@pytest.mark.usefixtures("slurm")
def test_the_job_keeps_the_configuration_it_was_submitted_with(place: Path) -> None:
    own = place / "own.yaml"
    own.write_text("seed: 5\n")
    submit.main([*COMMON, "--config=own.yaml"])
    own.write_text("seed: 6\n")
    run = RunDir(place / "runs" / "one")
    with next(run.submitit.glob("*_submitted.pkl")).open("rb") as file:
        job = pickle.load(file)  # noqa: S301, our own
    again = parser.parse(job.function.argv)
    assert again.seed == 5
    assert rundir.run_folder(again) == run.path


def finish(run: RunDir) -> None:
    """Leave the run as one that has trained all its students."""
    config = parser.parse([*COMMON])
    run.create(config)
    run.write_status("finished", 100, students={name: {} for name in sizes.select(config.student)})


def test_a_finished_run_is_not_started_again(
    place: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(place / "runs" / "one")
    finish(run)
    for cluster in ("slurm", "local"):
        submit.main([*COMMON, f"--cluster={cluster}"])
        assert "finished (100000 steps): nothing to do" in capsys.readouterr().out
    assert not slurm.exists()


@pytest.mark.usefixtures("slurm")
def test_another_configuration_under_the_same_name_is_refused(place: Path) -> None:
    submit.main([*COMMON])
    with pytest.raises(UserError, match=r"job 7 has .*seed: 0 -> 1.*scancel 7 first"):
        submit.main([*COMMON, "--seed=1"])
    (place / "runs" / "one" / "checkpoints").mkdir()  # now there is something to lose
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        submit.main([*COMMON, "--seed=1", "--cluster=local"])


@pytest.mark.usefixtures("slurm")
def test_a_run_in_progress_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "runs" / "one"
    code = "import sys; from pathlib import Path; from mvat_dist.runs.lock import RunLock; "
    code += (
        "assert RunLock(Path(sys.argv[1]), 'train').acquire() is None; print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout
        other.stdout.readline()
        # Whoever waits for a finished run must not take this for one.
        for cluster in ("local", "slurm"):
            with pytest.raises(SystemExit) as ended:
                submit.main([*COMMON, f"--cluster={cluster}"])
            assert ended.value.code == submission.EXIT_BUSY
            output = capsys.readouterr().out
            assert f"trained by process {other.pid} on" in output
            assert "nothing new was started" in output
        run = RunDir(folder)
        finish(run)
        submit.main([*COMMON, "--cluster=local"])
        other.kill()
    # A lock dies with its owner: here the run could start.
    with submission._alone_in(RunDir(folder), "start") as (lock, is_new):
        assert lock is not None
        assert not is_new


def test_a_mistake_that_only_the_trainer_can_see_is_one_line_and_leaves_nothing(place: Path) -> None:
    (place / "holiday.jpg").write_bytes(b"not a model")
    files = tree(place)
    given = ["--data.segment_seconds=0.2", "--data.reverb_probability=0", "--train.batch=4"]
    given += ["--distil.method=output", "--teacher=holiday.jpg"]
    command = [sys.executable, "-m", "mvat_dist.submit", *COMMON, "--cluster=local", "--nodes=2", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert (done.stderr.count("\n"), done.stderr.startswith("error: ")) == (1, True), done.stderr
    assert "holiday.jpg" in done.stderr
    assert tree(place) == files


@pytest.mark.usefixtures("slurm")
def test_the_record_says_how_the_run_was_started(place: Path) -> None:
    submit.main([*COMMON, "--nodes=2"])
    record = json.loads((place / "runs" / "one" / "job.json").read_text())
    assert (record["cluster"], record["job_id"], record["nodes"]) == ("slurm", "7", 2)
    assert record["code"] == code_fingerprint()
