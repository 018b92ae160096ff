"""Runs of a study as jobs: submitit's local executor always, a one-node Slurm under ``-m slurm``.

The cluster is Debian's (``apt-get install slurm-wlm munge``), started here as root, without
accounting, and gone at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("submitit")

from tiny_studies import opened, study_of, values

from growkit.cli.main import main
from growkit.core.errors import UsageError
from growkit.study.cluster import TRIES, Cluster
from growkit.study.one_run import BUSY, held
from growkit.study.selection import choose

WAIT = 300.0


def test_the_code_and_the_words_of_a_job_come_back(tmp_path: Path) -> None:
    """One that has nothing to do, and one whose run is made elsewhere at the moment."""
    cluster = Cluster({"timeout_min": 5}, kind="local")
    logs = [tmp_path / name for name in ("empty", "busy")]
    for folder in logs:
        folder.mkdir()
    with held(logs[1]) as alone:
        assert alone
        runs = [cluster.start(folder, (folder / "log").open("ab")) for folder in logs]
        codes = [run.wait(WAIT) for run in runs]
    assert codes == [1, BUSY]
    assert "node.json" in (logs[0] / "log").read_text()


def test_a_lost_job_is_submitted_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # submitit waits as long for a result that a network drive may show late.
    monkeypatch.setattr("submitit.Job._results_timeout_s", 0)
    log = tmp_path / "log"
    run = Cluster(kind="local").start(tmp_path, log.open("ab"))
    for number in range(1, TRIES + 1):
        assert run.tries == number
        os.kill(int(run.job.job_id), signal.SIGKILL)
        run.job._process.wait()
        run.poll()
    assert run.poll() == 1
    said = log.read_text()
    assert said.count("submitted again") == TRIES - 1 and f"of {TRIES} submissions" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--executor", "cloud"], "'cloud'"),
        (["--partition", "main"], "the executor is local"),
        (["--executor", "slurm", "--slurm", "time"], "cannot be used"),
        (["--executor", "slurm", "--slurm", "colour=red"], "submitit cannot use these jobs"),
    ],
)
def test_wrong_usage(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values()))
    assert main(["study", str(path), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_no_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="sbatch has to be on this machine"):
        Cluster()


# -- a real one -----------------------------------------------------------------------------------

CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
SlurmctldPort={port}
SlurmdPort={second}
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd")) or os.getuid():
        pytest.skip("needs slurm-wlm and munge, and root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    port, second = ports(2)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(host=host, folder=folder, port=port, second=second))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    os.environ["SLURM_CONF"] = str(conf)
    started = []

    def begin(*command: str) -> None:
        out = (folder / "daemons.log").open("ab")
        started.append(subprocess.Popen(command, stdout=out, stderr=out))

    begin("munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
          f"--key-file={key}", f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/seed",
          f"--log-file={folder}/munge.log")  # fmt: skip
    try:
        waited(lambda: (folder / "munge.socket").exists())
        begin("slurmctld", "-D", "-f", str(conf))
        begin("slurmd", "-D", "-f", str(conf), "-N", host)
        waited(lambda: "idle" in asked("sinfo", "-h", "-o", "%T"))
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], check=False)
        time.sleep(1)
        for process in reversed(started):
            process.terminate()
            process.wait(20)
        del os.environ["SLURM_CONF"]


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def waited(condition: Any, seconds: float = WAIT) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it did not come about"
        time.sleep(0.2)


@pytest.mark.slurm
def test_a_study_on_a_cluster(slurm: Path, tmp_path: Path) -> None:
    """Two jobs at a time; one is killed, and the study is that of the processes of one machine."""
    shared = values(
        arms={"on": {"base": "small"}, "signal": {"base": "small", "grow": {"ffn": "x2"}}}
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(shared))
    command = [sys.executable, "-m", "growkit", "study", str(path), "--out", str(tmp_path / "out"),
               "--executor", "slurm", "--partition", "main", "--slurm", "time=30",
               "--slurm", "cpus_per_task=1", "--workers", "2", "--verbose"]  # fmt: skip
    log = (tmp_path / "study.log").open("wb")
    study = subprocess.Popen(command, stdout=log, stderr=log)
    waited(lambda: "RUNNING" in asked("squeue", "-h", "-o", "%T"))
    (first,) = asked("squeue", "-h", "-o", "%A").split()
    assert not asked("scancel", "--signal=KILL", "--full", first)
    assert study.wait(WAIT * 3) == 0, (tmp_path / "study.log").read_text()[-3000:]
    logs = [file.read_text() for file in (tmp_path / "out" / "runs").glob("*/log.txt")]
    assert sum("submitted again" in text for text in logs) == 1
    recipe = study_of(**{key: shared[key] for key in ("arms",)})
    again = opened(tmp_path / "out", recipe)
    done, planned = again.progress(choose(recipe, [], []))
    assert done == planned == 3  # by the keys that any other study has


@pytest.mark.slurm
def test_torchrun_in_two_tasks_and_a_requeued_job(slurm: Path, tmp_path: Path) -> None:
    """docs/distributed.md's script, on one node: one torchrun a task, taken away and back."""
    import random

    source = random.Random(1)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(str(source.random()) for _ in range(3000)) + "\n")
    recipe = {
        "model": {"config": dict(values()["bases"]["small"]["config"])},
        "tokenizer": {"bytes": True},
        "data": {"files": [str(text)], "sequence_length": 16, "max_eval_tokens": 160},
        "training": {"max_steps": 400, "per_device_train_batch_size": 2, "use_cpu": True,
                     "logging_steps": 20, "eval_steps": 400, "save_steps": 20,
                     "gradient_accumulation_steps": 2},
        "parallel": {"strategy": "fsdp", "processes": 2},
    }  # fmt: skip
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe))
    (port,) = ports(1)
    script = tmp_path / "job.sh"
    script.write_text(
        f"""#!/bin/bash
#SBATCH --ntasks=2
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={tmp_path}/job.log
export OMP_NUM_THREADS=1
srun {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d \\
     --rdzv-endpoint 127.0.0.1:{port} --rdzv-id "$SLURM_JOB_ID" \\
     -m growkit train {path} --out {out} --quiet
"""
    )
    job = asked("sbatch", "--parsable", str(script)).strip()
    checkpoints = out / "training" / "checkpoints"
    waited(lambda: (checkpoints / "checkpoint-20").exists())
    subprocess.run(["scontrol", "requeue", job], check=True)
    waited(lambda: not asked("squeue", "-h", "-t", "running", "-o", "%A"))
    at = sorted(int(p.name.split("-")[1]) for p in checkpoints.glob("checkpoint-*"))
    assert at and at[-1] < 400
    begin = asked("scontrol", "show", "job", job)
    assert "Restarts=1" in begin
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False)
    waited(lambda: (out / "config.json").is_file(), WAIT * 2)
    assert not list(out.rglob("*.partial"))
