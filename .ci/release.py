"""Whether a tag may be released: it is the version, which the changelog dates.

Usage: python .ci/release.py TAG
"""

import os
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]


def faults(
    tag: str, root: pathlib.Path = ROOT, repository: str | None = None
) -> list[str]:
    """What stands against releasing the tree under this tag, from this repository."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    version, source = project["version"], project["urls"]["Source"]
    package = (root / "flood_optax" / "__init__.py").read_text(encoding="utf-8")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$"
    dates = re.findall(dated, changelog, re.MULTILINE)
    # the links of the README that an index shows lead to the source
    elsewhere = repository and source != f"https://github.com/{repository}"
    holds = {
        f"the tag {tag} is not v{version}": tag == f"v{version}",
        "flood_optax.__version__ differs": f'__version__ = "{version}"\n' in package,
        "CITATION.cff differs": f"\nversion: {version}\n" in citation,
        "CHANGELOG.md has no dated section": bool(dates),
        "CITATION.cff has another date": not dates
        or f'\ndate-released: "{dates[0]}"\n' in citation,
        f"{source} is not {repository}": not elsewhere,
    }
    return [fault for fault, held in holds.items() if not held]


if __name__ == "__main__":
    found = faults(sys.argv[1], repository=os.environ.get("GITHUB_REPOSITORY"))
    sys.exit("\n".join(found) if found else 0)
