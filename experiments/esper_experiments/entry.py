"""The `esper` command: makes sure that `esper` is this project's package, then runs the CLI.

PyPI's distribution `esper`, an entity-component-system library for games, brings an import package
of the same name. Beside an editable install it hides ours; beside an installed wheel it overwrites
our `esper/__init__.py`. Both would surface as an `ImportError` that nobody can make sense of, so
this module looks before anything imports `esper`.
"""

import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

_CURE = """\
  python -m pip uninstall --yes esper
  python -m pip install --force-reinstall --no-deps esper-morphogenetic
In a checkout, the second line is
  python -m pip install --force-reinstall --no-deps --editable ."""


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With status 2 if `esper` is not this project's package, else the CLI's status.
    """
    problem = find_problem()
    if problem is not None:
        print(f"{problem}\nTo repair this environment:\n{_CURE}", file=sys.stderr)
        raise SystemExit(2)
    from esper.cli.main import app

    # plug-ins and hosts may be modules of the folder one works in; last, so that it hides nothing
    sys.path.append(str(Path.cwd()))
    app()


def find_problem() -> str | None:
    """Why `import esper` would not give this project's package, or None if it would.

    Imports nothing, since the wrong package might do anything when imported.
    """
    try:
        other = metadata.distribution("esper")
    except metadata.PackageNotFoundError:
        return _find_wrong_module()
    return (
        f"The distribution 'esper' {other.version} (a library for games, in "
        f"{other.locate_file('')}) must not be installed beside 'esper-morphogenetic': both "
        "bring an import package named esper."
    )


def _find_wrong_module() -> str | None:
    spec = find_spec("esper")
    if spec is None:
        return "The package esper must be importable, but is not found."
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if spec.origin is None or not any((folder / "cli").is_dir() for folder in folders):
        place = spec.origin or ", ".join(map(str, folders))
        return (
            f"The package esper must be that of 'esper-morphogenetic', but another is in {place}."
        )
    return None
