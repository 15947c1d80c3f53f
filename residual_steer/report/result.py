"""What an experiment found: tables, plots and verdicts, with everything that is needed to find it again.

    Result(
        name="retrieval", title="Associative recall", about="…", command=command_line(), seeds=(0, 1, 2),
        settings={"steps": 500}, machine=machine(), versions=versions(), seconds=81.5,
        tables=(Table("Recall", columns=(Column("method", "method"), Column("accuracy", "accuracy", "%", "up", 2)),
                      rows=({"method": "H-Res", "accuracy": Measured.of([81.9, 82.4, 82.1])},)),),
    ).save("results/retrieval.json")

Every class checks itself when it is made, whether by a program or by `Result.load`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from residual_steer.errors import SteerError
from residual_steer.files import as_path, make_folder, write_whole

from .axis import Axis
from .environment import portable
from .pictures import Picture
from .schema import check_fields, decode, encode, short
from .series import Plot, Series
from .table import Cell, Column, Measured, Table

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Axis",
    "Cell",
    "Column",
    "Measured",
    "Plot",
    "Result",
    "Series",
    "Table",
    "Verdict",
    "read_json",
]

FORMAT, FORMAT_VERSION = "residual_steer.result", 1
CLAIMS = range(1, 11)  # the paper's, as claims.py lists them


@dataclass(frozen=True)
class Verdict:
    """What a result says about one of the paper's claims.

    Attributes:
        claim: its number, 1 to 10.
        verdict: in these words.
        paper: the paper's number that this is held against.
        ours: what was measured here, with spread and seeds.
        command: that measures it again.
        missing: what a fuller test would need; "" for nothing.
    """

    claim: int
    verdict: Literal["holds", "does not hold", "partly holds", "not run here", "can't be tested here"]
    paper: str
    ours: str
    command: str
    missing: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.claim not in CLAIMS:
            raise SteerError(f"the paper's claims are 1 to {CLAIMS[-1]}; received {self.claim}.")


@dataclass(frozen=True)
class Result:
    """Everything that one experiment found.

    Attributes:
        name: of its files: small letters and digits, with `-`, `_` or `.` between them.
        title: of its section in the report.
        about: what was done, in a few sentences; blank lines part paragraphs.
        command: that does it again; see `command_line`.
        seeds: that were run.
        settings: what was chosen, as JSON.
        machine: where it ran; see `machine`.
        versions: of Python and packages; see `versions`.
        tables: what was found, in numbers.
        plots: what was found, in pictures.
        verdicts: on claims of the paper.
        seconds: wall-clock time of the whole.
        records: the raw runs, as any JSON; not shown in the report.
    """

    name: str
    title: str
    about: str
    command: str
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    tables: tuple[Table, ...] = ()
    plots: tuple[Picture, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    seconds: float = 0.0
    records: Any = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not re.fullmatch(r"[a-z0-9]+([-_.][a-z0-9]+)*", self.name) or len(self.name) > 100:
            raise SteerError(
                f"a result's name is small letters and digits, with -, _ or . between them; received {self.name!r}."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all; paths of this machine are cut to their last names.

        Raises:
            SteerError: it cannot be written; what was there before is untouched.
        """
        place = as_path(path)
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **portable(encode(self))}
        make_folder(place.parent)
        write_whole({place: (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read what `save` wrote, and nothing else.

        Raises:
            SteerError: the file cannot be read or is no result; a field is missing, unknown or wrong.
        """
        return cls.parse(read_json(as_path(path)), str(path))

    @classmethod
    def parse(cls, content: Any, source: str) -> Result:
        """Make a result of JSON.

        Args:
            content: what `read_json` returned.
            source: how messages call it.

        Raises:
            SteerError: it is no result; a field is missing, unknown or wrong.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise SteerError(f'{source} is no result: it needs an object with "format": "{FORMAT}".')
        fields = dict(content)
        kind, version = fields.pop("format"), fields.pop("format_version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise SteerError(
                f"{source} is of format {kind!r}, version {short(version)}; "
                f"this library reads version {FORMAT_VERSION}."
            )
        return decode(cls, fields, source)


def read_json(path: Path) -> Any:
    """Read a JSON file, as strict as JSON is: no key twice in an object, and no NaN.

    Raises:
        SteerError: the file cannot be read, or is no JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice in an object")
        return dict(pairs)

    def refuse(name: str) -> None:
        raise ValueError(f"JSON has no {name}")

    try:
        return json.loads(path.read_bytes().decode(), object_pairs_hook=once, parse_constant=refuse)
    except OSError as error:
        raise SteerError(f"could not read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise SteerError(f"{path} holds no JSON: {str(error)[:200]}.") from error
