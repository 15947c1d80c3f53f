"""Print requirements that pin what the library runs on to the lower bounds of pyproject.toml.

`torch>=2.6` becomes `torch==2.6.*`: the newest bug fix of the oldest release that is claimed. What stands in `dev` for
development alone is left to the resolver, and so is every package in FREE; those in TIED are pinned even so.

    python .ci/oldest.py > oldest.txt
    python .ci/oldest.py docs > docs.txt    # what an extra asks for, as it stands, without the library itself
"""

import re
import sys
from collections.abc import Collection
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; the pins are needed before anything is installed
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
BOUND = re.compile(r"^([A-Za-z0-9_.-]+)>=([0-9.]+)( *;.+)?$")
# Our bounds on these hold where no extra is installed; the oldest transformers and datasets need newer ones.
FREE = ("huggingface_hub", "tqdm")
TIED = ("torchao",)  # a newer one cannot be imported beside the oldest torch, and then neither can transformers


def pins(project: dict, free: Collection[str] = FREE) -> list[str]:
    """Return the requirements of the library and of the extras that `dev` names, pinned, and the others of `dev`.

    Args:
        project: the table `project` of pyproject.toml.
        free: names of packages that are not pinned.
    """
    extras = project["optional-dependencies"]
    own = re.compile(rf"{re.escape(project['name'])}\[(.+)\]")

    def flat(text: str) -> list[str]:
        """Return a requirement, or those of the extras that it names."""
        named = own.fullmatch(text)
        return [x for part in named[1].split(",") for y in extras[part.strip()] for x in flat(y)] if named else [text]

    rest = [text for text in extras["dev"] if not own.fullmatch(text) and not text.startswith(TIED)]
    run = [*project["dependencies"], *(x for text in extras["dev"] if text not in rest for x in flat(text))]
    return [*dict.fromkeys(_pin(text, free) for text in run), *rest]


def _pin(text: str, free: Collection[str]) -> str:
    """Return a requirement pinned to its lower bound.

    Raises:
        SystemExit: it is not written `name>=version`.
    """
    bound = BOUND.match(text)
    if bound is None:
        raise SystemExit(f"a lower bound is written name>=version; pyproject.toml has {text!r}.")
    return text if bound[1] in free else f"{bound[1]}=={bound[2]}.*{bound[3] or ''}"


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    print("\n".join(extras[sys.argv[1]] if sys.argv[1:] else pins(project)))
