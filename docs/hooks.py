"""What mkdocs does beside its own: pages at the repository's root become pages of the site, with their pictures.

Links to them stay what they are on a forge, `../../CLAIMS.md`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ("CLAIMS", "BENCHMARKS", "COVERAGE", "CHANGELOG", "CONTRIBUTING")
LINK = re.compile(rf"\]\((?:\.\./)+({'|'.join(PAGES)})\.md")


def on_files(files, config):
    """Add the pages, and what they link to."""
    for name in PAGES:
        path = ROOT / f"{name}.md"
        files.append(File.generated(config, f"about/{name.lower()}.md", abs_src_path=str(path)))
        for link in set(re.findall(r"\]\((benchmarks/[^)\s]+)\)", path.read_text("utf-8"))):
            files.append(File.generated(config, f"about/{link}", abs_src_path=str(ROOT / link)))
    return files


def on_page_markdown(markdown, page, **_):
    """Let links to the pages lead to where they stand in the site."""
    here = posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda found: f"]({posixpath.relpath(f'about/{found[1].lower()}.md', here or '.')}", markdown)
