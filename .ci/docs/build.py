"""Builds the reference: the README as front page, the public names from their docstrings, the command line's help.

Sphinx gets a folder that is put together here, so that nothing but the sources of its pages is in the repository.
Every warning fails the build; then every link of every page is followed (see links.py).

    python .ci/docs/build.py build/docs
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click
from links import broken
from sphinx.cmd.build import build_main

from dask_influence.cli import cli

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHOWN = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "constraints.txt", "deploy", "examples")
"""What the README links to, or what that links to."""

CONTENTS = """
```{toctree}
:hidden:
:caption: Reference

reference/models
reference/reductions
reference/stores
reference/validation
reference/report
reference/command-line
reference/configuration
reference/errors
```

```{toctree}
:hidden:
:caption: More

examples/README
deploy/README
CONTRIBUTING
CHANGELOG
```
"""


def gather(folder: Path) -> None:
    """The sources of all pages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in SHOWN:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    shutil.copytree(HERE / "reference", folder / "reference")
    (folder / "dask_influence").mkdir()
    shutil.copy(ROOT / "dask_influence" / "influence.yaml", folder / "dask_influence")
    (folder / "index.md").write_text((ROOT / "README.md").read_text() + CONTENTS)
    (folder / "reference" / "commands.md").write_text("\n".join(helped(cli, "dask-influence")))


def helped(command: click.Command, name: str, parent: click.Context | None = None) -> list[str]:
    """What ``--help`` says of a command and of those below it, as Markdown."""
    settings = {**command.context_settings, "terminal_width": 100}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    lines = [f"### {context.command_path}", "", "```text", command.get_help(context), "```", ""]
    for below, one in getattr(command, "commands", {}).items():
        lines += helped(one, below, context)
    return lines


def main(output: Path) -> int:
    """Gather, build, follow the links; the exit code."""
    source = output / "source"
    gather(source)
    pages = output / "html"
    options = [
        "-q",
        "-W",
        "--keep-going",
        "-E",
        "-b",
        "html",
        "-c",
        str(HERE),
        "-d",
        str(output / "doctrees"),
    ]
    failed = build_main([*options, str(source), str(pages)])
    if failed:
        return failed
    wrong = broken(pages)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{pages / 'index.html'}: {len(list(pages.rglob('*.html')))} pages, {len(wrong)} broken links")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
