"""Jobs of SLURM: submitit's local executor runs one; a queue of shell scripts stands for SLURM."""

import json
import os
import signal
import subprocess
import time
from itertools import chain

import pytest

from lab.study.runner import FAILURE, prepare_runs, read_result
from lab.study.slurm import JOB, TrainingJob, read_parameters, read_queue, submit
from lab.study.status import read_states, state_table

submitit = pytest.importorskip("submitit")


@pytest.fixture(autouse=True)
def signal_handlers():
    """A job called in this process sets some; the next test finds those of before."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


SBATCH = """#!/bin/sh
cd "$(dirname "$0")"
cp "$1" last.sh
echo >> calls
number=$(wc -l < calls | tr -d ' ')
echo "$number|PENDING|$(sed -n 's/^#SBATCH --comment=//p' "$1")" >> queue
echo "Submitted batch job $number"
"""
SQUEUE = """#!/bin/sh
cat "$(dirname "$0")/queue"
"""


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    """The folder of the file ``queue``, with what squeue prints: sbatch adds a line to it."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "queue").touch()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "srun": "#!/bin/sh"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.fixture
def submit_all(study, cluster):
    """Submits all runs of the study."""
    prepare_runs(study.runs)

    def submit_all(**parameters):
        submit(study.runs, study.train, study.output / "jobs", 8, parameters)

    return submit_all


def wait_for_start(study, starts):
    """The process id of a run's start, and of the job that has started it."""
    deadline = time.monotonic() + 60
    while len(lines := [*chain(*study.starts().values())]) < starts:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = json.loads(lines[-1])[0]
    return pid, int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(pid)]))


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_goes_on(study):
    study.behave("hang")
    (run,) = prepare_runs(study.runs[:1])
    executor = submitit.LocalExecutor(study.output / "jobs", max_num_timeout=9)
    executor.update_parameters(timeout_min=3)
    job = executor.submit(TrainingJob(run, study.train))
    training, task = wait_for_start(study, starts=1)
    study.behave()
    os.kill(task, signal.SIGTERM)  # as SLURM does first: the training ends, the job stays
    os.kill(task, signal.SIGUSR2)
    assert job.result() is None
    assert len(study.starts()["nl/seed_1"]) == 2
    assert read_result(run)["bbox/AP"] == 60.0
    with pytest.raises(ProcessLookupError):
        os.kill(training, 0)


def test_a_job_whose_training_fails(study):
    study.behave("fail-nl")
    (run,) = prepare_runs(study.runs[:1])
    with pytest.raises(RuntimeError, match=r"nl, seed 1: exit status 1; see .*run\.log"):
        TrainingJob(run, study.train)()
    (state,) = read_states([run])
    assert (state.name, state.note) == ("failed", "exit status 1")


def test_each_run_is_a_job_with_its_parameters(study, cluster, submit_all):
    submit_all(partition="gpu", time=2880)
    assert [(run.folder / JOB).read_text() for run in study.runs] == ["1\n", "2\n", "3\n", "4\n"]
    script = (cluster / "last.sh").read_text()
    for option in ("partition=gpu", "time=2880", "gpus-per-node=8", "signal=USR2@120", "requeue"):
        assert f"#SBATCH --{option}\n" in script
    assert read_queue()[study.runs[3].folder] == ("4", "waiting")


@pytest.mark.parametrize(
    ("line", "files", "state", "busy"),
    [
        ("", {}, ("waiting", ""), False),
        ("7|PENDING|{}\n", {JOB: "7"}, ("waiting", "7"), True),
        ("7|RUNNING|{}\n", {}, ("running", "7"), True),  # killed before it wrote the id down
        ("7|PENDING|{}\n", {JOB: "6", FAILURE: "exit status 1"}, ("waiting", "7"), True),
        ("", {JOB: "7"}, ("failed", "7"), False),
        ("", {FAILURE: "exit status 1"}, ("failed", ""), False),
        ("8|RUNNING|\n9|RUNNING|other\n", {}, ("waiting", ""), False),
        ("7|RUNNING|{}\n", {JOB: "7", "result.json": '{"seconds": 9}'}, ("finished", "7"), False),
    ],
)
def test_states(study, cluster, line, files, state, busy):
    (run,) = prepare_runs(study.runs[:1])
    (cluster / "queue").write_text(line.format(run.folder))
    for name, text in files.items():
        (run.folder / name).write_text(text)
    (read,) = read_states([run])
    assert (read.name, read.job) == state
    assert read.is_busy == busy
    assert state_table([read]).splitlines()[2].split()[:3] == ["nl", "1", state[0]]


def test_a_queue_that_does_not_answer_is_no_empty_queue(cluster):
    (cluster / "queue").unlink()
    with pytest.raises(ValueError, match=r"squeue: .*queue"):
        read_queue()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"partitoin": "gpu"}, "SLURM: Unknown argument 'partitoin'"), ({}, "SLURM: .*no such")],
)
def test_what_slurm_refuses_is_one_line(cluster, submit_all, parameters, message):
    (cluster / "sbatch").write_text("#!/bin/sh\necho no such partition >&2\nexit 1\n")
    with pytest.raises(ValueError, match=message) as error:
        submit_all(**parameters)
    assert "\n" not in str(error.value)


def test_machines_without_slurm(study, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert read_queue() == {}
    with pytest.raises(ValueError, match="no sbatch"):
        submit(study.runs, study.train, study.output, 1, {})


def test_parameters_of_the_command_line():
    assert read_parameters(["partition=a=b", "time=60"]) == {"partition": "a=b", "time": 60}
    for word, message in {"gpu": "not KEY=VALUE", "time=1:00:00": "number of minutes"}.items():
        with pytest.raises(ValueError, match=message):
            read_parameters([word])
