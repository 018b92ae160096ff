"""Runs of a study as jobs of a Slurm cluster, by submitit (``pip install 'growkit[slurm]'``).

A job makes one run, by the program that a study otherwise starts as a process of its own
(:mod:`growkit.study.one_run`), so keys, records and resume are the same: folders are on a file
system that all nodes share, a run that another job makes at the moment is waited for, and a job
that is lost (killed, its node gone, preempted) is submitted again and continues from its last
checkpoint. Shortly before its time is over submitit has Slurm requeue it, with the same effect.

The queue alone is asked (``squeue``): ``sacct`` needs accounting, which small clusters do not have.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from growkit.core.errors import UsageError, require_extra
from growkit.core.quantities import counted

require_extra("submitit", "submitit", "slurm", "--executor slurm")

from submitit import AutoExecutor  # noqa: E402
from submitit.helpers import Checkpointable  # noqa: E402

TRIES = 5
ASKED = 10.0  # seconds between two questions to the queue
LATE = 30.0  # seconds that a result may need to be seen on a shared file system
JOBS = "jobs"


class MakeRun(Checkpointable):
    """What a job does; requeued, it does the same again."""

    def __call__(self, folder: str) -> int:
        """The exit code of :func:`growkit.study.one_run.main`."""
        from growkit.study.one_run import main

        cores = os.environ.get("SLURM_CPUS_PER_TASK")
        if cores is not None:
            os.environ.setdefault("OMP_NUM_THREADS", cores)
        return main([folder, str(os.getppid())])


class Cluster:
    """Where runs are submitted to.

    Args:
        options: parameters of submitit's executor: ``slurm_partition``, ``timeout_min``,
            ``cpus_per_task``, ``slurm_account`` ...
        kind: ``slurm``, or ``local``: processes of this machine, as submitit starts them.

    Raises:
        UsageError: an option that submitit does not know.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, kind: str = "slurm") -> None:
        self.options, self.kind = dict(options or {}), kind
        self._executor(Path(os.devnull).parent)

    def _executor(self, folder: Path) -> Any:
        try:
            executor = AutoExecutor(folder, cluster=self.kind)
            executor.update_parameters(**self.options)
        except (NameError, TypeError, RuntimeError) as error:
            raise UsageError(
                f"submitit cannot use these jobs: {str(error).splitlines()[0]}",
                "--slurm takes sbatch's options, time=120 (minutes) or cpus_per_task=8 say; sbatch "
                "has to be on this machine.",
            ) from error
        return executor

    def start(self, folder: Path, log: IO[bytes]) -> ClusterRun:
        """Submit the run that ``folder/node.json`` describes."""
        return ClusterRun(self, folder, log)


class ClusterRun:
    """A submitted run, with what a study asks of a process."""

    def __init__(self, cluster: Cluster, folder: Path, log: IO[bytes]) -> None:
        self.cluster, self.folder, self.log = cluster, folder, log
        self.tries = 0
        self._submit()

    def _submit(self) -> None:
        self.tries += 1
        self.code: int | None = None
        self._asked, self._gone = time.monotonic(), 0.0
        executor = self.cluster._executor(self.folder / JOBS)
        self.job = executor.submit(MakeRun(), str(self.folder))

    def poll(self) -> int | None:
        """The exit code; None while the job waits or runs."""
        if self.code is None and self._ended():
            self.code = self._result()
        return self.code

    def _ended(self) -> bool:
        if self.job.paths.result_pickle.exists():
            return True
        if self.cluster.kind != "slurm":
            return bool(self.job.done())
        now = time.monotonic()
        if self._gone:
            return now - self._gone > LATE
        if now - self._asked > ASKED:
            self._asked = now
            if not self._queued():
                self._gone = now
        return False

    def _queued(self) -> bool:
        command = ["squeue", "--noheader", "--format=%T", "--jobs", str(self.job.job_id)]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode and "Invalid job id" not in asked.stderr:
            return True  # the controller does not answer: asked again
        return bool(asked.stdout.strip())

    def _result(self) -> int | None:
        if not self.job.paths.result_pickle.exists() and self.tries < TRIES:
            self._say(f"job {self.job.job_id} was lost; submitted again")
            self._submit()
            return None
        try:
            code = int(self.job.result())
            if code:
                self._say(self.job.stderr() or "")
        except Exception as error:  # of the job, or none came back
            self._say(self.job.stderr() or "")
            lines = [line for line in str(error).splitlines() if line.strip()]
            told = lines[-1].strip() if lines else type(error).__name__
            self._say(
                f"job {self.job.job_id} failed, of {counted(self.tries, 'submission')}: {told}"
            )
            return 1
        return code

    def _say(self, text: str) -> None:
        self.log.write(text.strip().encode() + b"\n")
        self.log.flush()

    def wait(self, timeout: float | None = None) -> int | None:
        """Until it ended.

        Raises:
            subprocess.TimeoutExpired: it did not in ``timeout`` seconds.
        """
        begun = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - begun > timeout:
                raise subprocess.TimeoutExpired("job", timeout)
            time.sleep(0.5)
        return self.code

    def terminate(self) -> None:
        """Ask it to save its last step and end; it is not submitted again."""
        self.tries = TRIES
        with contextlib.suppress(Exception):
            self.job.cancel(check=False)

    kill = terminate
