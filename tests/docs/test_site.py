"""The site tells everything there is, and nothing on it is broken or fetched from elsewhere.

`make docs` builds it strictly; what can be told without building is told here in a second or two.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from pydantic import BaseModel

from esper.config.base import Config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = ("kernels", "platform", "experiments", "serve_apps")
PUBLIC = ("esper", "esper.controller", "esper.tracking.pictures", "esper_kernels",
          "esper_kernels.seeds", "esper_experiments.text")  # fmt: skip


@pytest.fixture(scope="module")
def pages():
    # as the hook is loaded: its folder is a path of modules
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS / "generate")
        import_module("hooks")
        return import_module("pages")


@pytest.fixture(scope="module")
def made(pages):
    return pages.all_pages(ROOT)


def test_every_module_has_a_place(made):
    told = set(re.findall(r"^::: (\S+)$", "\n".join(made.values()), re.M))
    there = {
        ".".join(file.relative_to(ROOT / source).with_suffix("").parts).removesuffix(".__init__")
        for source in SOURCES
        for file in (ROOT / source).glob("esper*/**/*.py")
    }
    # its names are told where they are at home, commands by what they print as help
    apart = {"esper", *(name for name in there if name.startswith("esper.cli"))}
    assert there - told == apart
    assert told <= there


def test_every_public_name_is_told_and_explained(made):
    told = set(re.findall(r"^::: (\S+)$", "\n".join(made.values()), re.M))
    for module in PUBLIC:
        for name in import_module(module).__all__:
            thing = getattr(import_module(module), name)
            if not callable(thing):
                continue
            assert thing.__doc__, f"{module}.{name} must have a docstring"
            assert thing.__module__ in told, f"{module}.{name} must be on a page of the reference"
    for name in import_module("esper").__all__:
        assert name == "__version__" or f"`esper.{name}`" in made["reference/index.md"]


def test_every_key_is_explained(pages, made):
    assert (
        "| `max_active_seeds` | integer > 0 or null | `null` |"
        in made["reference/configuration.md"]
    )

    class Silent(Config):
        """Has a key that nobody explained."""

        speed: int = 1

    with pytest.raises(ValueError, match=r"Silent\.speed must have a description"):
        pages.table(Silent)


def test_every_model_of_a_body_or_file_is_told(pages, made):
    told = made["reference/configuration.md"] + made["reference/wire.md"]
    roots = [model for *_, model in pages.FILES] + list(pages.WIRE)
    for model in pages.models_inside(roots):
        assert issubclass(model, BaseModel)
        assert f"{{#{model.__name__.lower()}}}" in told


def test_every_exit_code_and_metric_is_told(made):
    for code in (0, 1, 2, 3, 4, 5, 130):
        assert f"| {code} | " in made["reference/exit_codes.md"]
    for decision in ("10 HOLD", "20 ROLLBACK", "30 INCONCLUSIVE"):
        assert decision in made["reference/exit_codes.md"]
    metrics = import_module("esper.monitoring.metrics").METRICS
    assert all(f"| `{name}` |" in made["reference/metrics.md"] for name in metrics)


def test_every_result_has_its_command(made):
    for file in (DOCS / "results").glob("*.json"):
        (line,) = [x for x in made["results/overview.md"].splitlines() if f" {file.stem} " in x
                   or f"[{file.stem}]" in x]  # fmt: skip
        assert "`esper a" in line


def test_links_and_nav_lead_somewhere(made):
    there = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*") if p.is_file()} | set(made)
    there |= {"images/lifecycle.svg", *import_module("hooks").OUTSIDE.values()}
    for page in DOCS.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not re.match(r"\w+:", target):
                found = (page.parent / target).resolve()
                ok = found.exists() or (
                    found.is_relative_to(DOCS) and found.relative_to(DOCS).as_posix() in there
                )
                assert ok, f"{page.relative_to(ROOT)} links to {target}"
    nav = (ROOT / "properdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"(?<![\w/*])[\w/]+\.md", nav)
    assert [p for p in listed if p not in there] == []


def test_a_pattern_of_the_nav_takes_what_there_is(pages):
    expand = import_module("hooks").expand
    known = ["decisions/b.md", "decisions/a.md", "log.md"]
    assert expand({"Decisions": "decisions/*.md"}, known) == [
        {"Decisions": ["decisions/a.md", "decisions/b.md"]}
    ]
    assert expand({"Migration": "migration/*.md"}, known) == []
    assert expand({"Log": "log.md"}, known) == [{"Log": "log.md"}]


def test_the_diagram_shows_every_stage_and_move(pages):
    picture = import_module("diagram").lifecycle()
    for (before, kind), after in import_module("esper.seeds.lifecycle").MOVES.items():
        assert f"{before.name} - {kind.__name__} - {after.name}<" in picture
    assert picture.count("<rect") == 1 + len(import_module("esper.seeds.state").Stage)


@pytest.mark.slow
def test_it_builds_and_fetches_nothing(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [Path(sys.executable).with_name("properdocs"), "build", "--strict",
               "--site-dir", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = "\n".join(p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.html"))
    assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="?https?://[^">]*', html) == []
    assert 'id="esper.surgery.lattice.Lattice"' in html
    assert 'id="growthconfig"' in html
