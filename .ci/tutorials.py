"""Run notebooks again, each in an empty folder, and keep what they print: `make tutorials`.

    python .ci/tutorials.py docs/tutorials/vit.ipynb    # or all of them

Times are not kept, nor warnings, which name files of this machine: they are shown.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs/tutorials"


def main() -> None:
    """Run them."""
    for path in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        book = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(book, record_timing=False, resources={"metadata": {"path": folder}}).execute()
        for cell in book.cells:
            for out in [out for out in cell.get("outputs", ()) if out.get("name") == "stderr"]:
                print(f"{path.name}: {out.text}", file=sys.stderr)
                cell.outputs.remove(out)
        book.metadata["language_info"] = {"name": "python"}
        nbformat.write(book, path)


if __name__ == "__main__":
    main()
