"""What MkDocs does not do by itself: pages made from the code, patterns in the nav, the README.

Pages of the repository link to each other as GitHub resolves them. The README and its like lie
outside `docs/`, so that links to them are turned to the pages which this module makes of them.
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from posixpath import relpath
from typing import Any

import diagram
import pages
from properdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "vulnerabilities.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated, then resolve the patterns of the nav."""
    made = pages.all_pages(ROOT) | {"images/lifecycle.svg": diagram.lifecycle()}
    for source, page in OUTSIDE.items():
        made[page] = inside((ROOT / source).read_text(encoding="utf-8"))
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    known = [f.src_uri for f in files.documentation_pages()]
    config.nav = [entry for item in config.nav for entry in expand(item, known)]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside `docs/` to their pages."""
    here = Path(page.file.src_uri).parent.as_posix()
    for source, target in OUTSIDE.items():
        outside = relpath(source, f"docs/{here}")
        markdown = markdown.replace(f"]({outside}", f"]({relpath(target, here)}")
    return markdown


def inside(markdown: str) -> str:
    """A page of the repository's root, with its links as seen from `docs/`."""
    markdown = markdown.replace("](docs/results)", "](results/README.md)")
    for source, page in OUTSIDE.items():
        markdown = markdown.replace(f"]({source}", f"]({page}")
    return re.sub(r"\]\(docs/", "](", markdown)


def expand(item: Any, known: list[str]) -> list[Any]:
    """One entry of the nav with its patterns replaced by the pages that match.

    A section without pages is left out, so that a folder may come later.
    """
    if isinstance(item, str):
        return sorted(p for p in known if fnmatch(p, item)) if "*" in item else [item]
    ((title, below),) = item.items()
    if isinstance(below, str) and "*" not in below:
        return [item]
    entries = [below] if isinstance(below, str) else below
    found = [entry for each in entries for entry in expand(each, known)]
    return [{title: found}] if found else []
