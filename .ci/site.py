"""MkDocs sees only docs/: this hook adds the files around it that pages link to, below project/.

The links stay as they are in the files, where they work on a code host too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = ("*.md", "LICENSE", "examples/**/*.py", "examples/**/*.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)(?P<path>[^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = f"project/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links lead to where the files are in the site."""
    source = page.file.src_uri
    inside = not source.startswith("project/")
    folder = posixpath.dirname(f"docs/{source}" if inside else source.removeprefix("project/"))

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link["path"]))
        there = target.removeprefix("docs/") if target.startswith("docs/") else f"project/{target}"
        return posixpath.relpath(there, posixpath.dirname(source) or ".")

    return LINK.sub(moved, markdown)
