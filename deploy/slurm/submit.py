"""Runs a job file on workers that are jobs of Slurm.

    pip install -c constraints.txt '.[dashboard]' dask-jobqueue
    python submit.py job.yaml --workers 20 --cores 4 --memory 16GiB --queue cpu --walltime 08:00:00

The scheduler and the client run here: on a login node, or in a batch job of their own (job.sbatch). All nodes
see the same files, or the job file names an object store. Ended by the time limit, the same call goes on where
it was.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import click
from dask_jobqueue import SLURMCluster


@click.command()
@click.argument("job", type=click.Path(exists=True, dir_okay=False))
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Jobs of Slurm.")
@click.option(
    "--cores", type=click.IntRange(min=1), default=4, show_default=True, help="Of each: torch's threads."
)
@click.option("--memory", default="16GiB", show_default=True, help="Of each.")
@click.option("--queue", help="Partition.")
@click.option("--account")
@click.option("--walltime", default="08:00:00", show_default=True, help="Of each.")
@click.option("--gpu", is_flag=True, help="One for each.")
@click.option("--scratch", default="/tmp", show_default=True, help="Folder on the node's own disk.")
@click.option("--prologue", multiple=True, help="Line of the batch script, such as 'module load python'.")
@click.option("--interface", help="Network of nodes, such as ib0.")
def main(
    job: str,
    workers: int,
    cores: int,
    memory: str,
    queue: str | None,
    account: str | None,
    walltime: str,
    gpu: bool,
    scratch: str,
    prologue: tuple[str, ...],
    interface: str | None,
) -> None:
    """Run JOB on workers that are jobs of Slurm."""
    threads = [f"export {library}_NUM_THREADS={cores}" for library in ("OMP", "MKL", "OPENBLAS")]
    with SLURMCluster(
        queue=queue,
        account=account,
        walltime=walltime,
        cores=1,  # differentiation is one at a time in a process: torch's own threads do the rest
        processes=1,
        job_cpu=cores,
        memory=memory,
        death_timeout=120,
        local_directory=scratch,
        interface=interface,
        job_script_prologue=[*prologue, *threads],
        job_extra_directives=["--gres=gpu:1"] if gpu else [],
        scheduler_options={"dashboard_address": ":0"},
    ) as cluster:
        cluster.scale(jobs=workers)
        command = [sys.executable, "-m", "dask_influence.cli", "run", job]
        settings = {"DASK_INFLUENCE__TORCH_THREADS": str(cores), "DASK_INFLUENCE__WAIT_FOR_WORKERS": "3600 s"}
        client = subprocess.Popen(
            [*command, "--scheduler-address", cluster.scheduler_address], env={**settings, **os.environ}
        )
        # the client stops cleanly, and then the jobs of the workers are cancelled
        signal.signal(signal.SIGTERM, lambda number, frame: client.send_signal(number))
        code = client.wait()
    sys.exit(code)


if __name__ == "__main__":
    main()
