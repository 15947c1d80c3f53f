"""Names of tensors, without what wrappers add: `module.` in front (data parallelism), `_orig_mod.` (torch.compile)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .errors import SteerError

__all__ = ["find_names", "plain_key", "plain_keys", "some"]


def plain_key(key: str) -> str:
    """Strip a tensor's name, or its key in a file: `module.train.module.head._orig_mod.bias` is `train.head.bias`."""
    parts = [part for part in key.split(".") if part != "_orig_mod"] or [key]
    parts = _unwrap(parts)
    if parts[0] == "train":
        parts = parts[:1] + _unwrap(parts[1:])
    return ".".join(parts)


def plain_keys(keys: Iterable[str]) -> dict[str, str] | None:
    """Return every key with its plain name; None if two become one."""
    plain = {key: plain_key(key) for key in keys}
    return plain if len(set(plain.values())) == len(plain) else None


def find_names(wanted: Iterable[str], there: Iterable[str]) -> Mapping[str, str]:
    """Find names among others that may be wrapped differently: as they stand first, then by their plain names.

    So a part that is really called `module` is found by its own name.

    Args:
        wanted: the names to find.
        there: the names among which to look.

    Returns:
        The name that was found for each; what was not found, or could be several, is left out.

    Raises:
        SteerError: two of the names find the same one.
    """
    by_plain = defaultdict(list)
    names = set(there)
    for name in names:
        by_plain[plain_key(name)].append(name)
    found: dict[str, str] = {}
    for name in wanted:
        hits = [name] if name in names else by_plain[plain_key(name)]
        if len(hits) == 1:
            found[name] = hits[0]
    finders = {hit: name for name, hit in found.items()}
    if len(finders) < len(found):
        two = next([name, finders[hit]] for name, hit in found.items() if finders[hit] != name)
        raise SteerError(
            f"the tensors {' and '.join(map(repr, two))} become one without the names of wrappers (`module.` in front, "
            "`_orig_mod.`). Drop one of them."
        )
    return found


def some(names: Sequence[str]) -> str:
    """Return the first of many names, each of them cut where it is very long."""
    return ", ".join(name[:100] for name in names[:6]) + (", …" if len(names) > 6 else "")


def _unwrap(parts: list[str]) -> list[str]:
    """Drop the leading parts `module`, if anything is left then."""
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return parts
