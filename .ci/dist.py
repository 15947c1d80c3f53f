"""Build the source distribution and the wheel in dist/, from what git tracks, and check them: `make dist`.

    python .ci/dist.py https://github.com/owner/name

With the address of the repository, the README's links and pictures become absolute, so that they work on PyPI, and the
address becomes one of the project's URLs. The commit is tagged v and the version.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def absolute(text: str, repository: str, version: str) -> str:
    """Return Markdown whose links into the repository, and pictures, are absolute."""

    def whole(found: re.Match[str]) -> str:
        kind = "raw" if found[1] else "blob"
        return f"{found[1]}[{found[2]}]({repository}/{kind}/v{version}/{found[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)]+)\)", whole, text)


def main() -> None:
    """Build and check."""
    repository = sys.argv[1].rstrip("/") if sys.argv[1:] else ""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, tracked.split("\0")):
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        if repository:
            project, readme = Path(folder, "pyproject.toml"), Path(folder, "README.md")
            words = project.read_text("utf-8")
            version = re.search(r'^version = "(.+)"', words, re.MULTILINE)[1]
            urls = f'[project.urls]\nRepository = "{repository}"\nIssues = "{repository}/issues"\n'
            urls += f'Changelog = "{repository}/blob/v{version}/CHANGELOG.md"\n'
            project.write_text(words.replace("[project.urls]\n", urls), "utf-8")
            readme.write_text(absolute(readme.read_text("utf-8"), repository, version), "utf-8")
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(ROOT / "dist"), folder], check=True)
    made = sorted(map(str, (ROOT / "dist").iterdir()))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *made], check=True)
    if not repository:
        print("The README's links are relative: for PyPI, make dist REPOSITORY=https://…", file=sys.stderr)


if __name__ == "__main__":
    main()
