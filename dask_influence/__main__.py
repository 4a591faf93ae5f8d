"""``python -m dask_influence``: the command line where its script is not on the path."""

from dask_influence.cli import cli

if __name__ == "__main__":
    cli(prog_name="python -m dask_influence")
