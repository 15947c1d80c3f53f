"""How a result was made, in the words that the report and the list of claims share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .cells import NOTHING
from .result import Result, Verdict

__all__ = ["facts_of", "hardware", "paragraphs", "seeds_of", "verdicts_of", "versions_of"]


def facts_of(result: Result) -> list[tuple[str, str]]:
    """Return label and text of everything that is needed to find a result again, but the command."""
    found = [
        ("seeds", seeds_of(result)),
        ("hardware", hardware(result.machine)),
        ("versions", versions_of(result)),
        ("took", duration(result.seconds)),
    ]
    return found + [(f"setting: {key}", plain(value)) for key, value in result.settings.items()]


def seeds_of(result: Result) -> str:
    """Write seeds briefly: `0–4 (5)`."""
    seeds = result.seeds
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}–{seeds[-1]} ({len(seeds)})"
    return ", ".join(map(str, seeds)) or NOTHING


def hardware(machine: Mapping[str, Any]) -> str:
    """Write what `machine` found in a line; unknown entries follow by name."""
    known = dict(machine)
    cpu, cores, threads = known.pop("cpu", None), known.pop("cores", None), known.pop("threads", None)
    gpu, system = known.pop("gpu", None), known.pop("system", None)
    parts = [plain(gpu) if gpu else "no GPU" if "gpu" in machine else None, plain(cpu) if cpu else None]
    parts.append(f"{plain(cores)} cores" if cores else None)
    parts.append(f"{plain(threads)} threads" if threads else None)
    parts.append(plain(system) if system else None)
    parts += [f"{key} {plain(value)}" for key, value in known.items()]
    return ", ".join(part for part in parts if part) or NOTHING


def versions_of(result: Result) -> str:
    """Write the versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in result.versions.items()) or NOTHING


def duration(seconds: float) -> str:
    """Write a time: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    if not seconds > 0:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain(value: Any) -> str:
    """Write JSON for people: texts and lists of them as they are."""
    if isinstance(value, str):
        return value or NOTHING
    if value is None:
        return NOTHING
    if isinstance(value, Sequence) and not any(isinstance(part, (Mapping, list)) for part in value):
        return ", ".join(map(plain, value)) or NOTHING
    if isinstance(value, Mapping) and value and not any(isinstance(part, (Mapping, list)) for part in value.values()):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    return json.dumps(value, ensure_ascii=False)


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part]


def verdicts_of(results: Sequence[Result]) -> list[tuple[Verdict, Result]]:
    """Return every verdict with its result, by the number of the claim."""
    found = [(verdict, result) for result in results for verdict in result.verdicts]
    return sorted(found, key=lambda pair: pair[0].claim)
