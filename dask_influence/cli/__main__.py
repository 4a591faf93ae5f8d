"""``python -m dask_influence.cli``: the command line without its entry point."""

from dask_influence.cli import cli

cli(prog_name="dask-influence")
