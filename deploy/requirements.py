"""Prints what the package and some of its extras require, for a layer that does not change with the code.

python deploy/requirements.py dashboard,metrics
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [extra for extra in sys.argv[1].split(",") if extra]
groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
print("\n".join(requirement for group in groups for requirement in group))
