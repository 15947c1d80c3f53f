"""How a method looks: colour, marker and dashes go with its name, so that it looks the same in every plot.

The colours are Okabe and Ito's, told apart with every common colour blindness; markers and dashes tell them apart in
grey. Methods that the paper or this library names have theirs once and for all. Others get what is left, in the order
of their names, over all plots of a report.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["INK", "PAPER", "QUIET", "Style", "colors_for", "styles_for"]

INK, QUIET, PAPER = "#1b1b1f", "#8a8a93", "#fefefe"  # a page that is dark puts others in their place
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
VERMILLION, SKY, YELLOW, GREY = "#d55e00", "#56b4e9", "#f0e442", "#7f7f7f"  # yellow comes last: pale on white


@dataclass(frozen=True)
class Style:
    """Colour, marker and dashes, in matplotlib's words."""

    color: str
    marker: str
    dashes: str | tuple[int, tuple[int, ...]]


_LONG, _DOUBLE = (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1))
_HRES, _FULL = Style(BLUE, "o", "-"), Style(VERMILLION, "s", "--")
_HEAD, _LORA = Style(GREEN, "^", ":"), Style(ORANGE, "D", "-.")
_PROMPTS, _FROZEN = Style(PURPLE, "v", _LONG), Style(INK, "X", (0, (1, 2)))
_MERGED, _ADAPTER = Style(SKY, "P", _DOUBLE), Style(GREY, "p", "-")
_KNOWN = {
    "h-res": _HRES,
    "full fine-tuning": _FULL,
    "full": _FULL,
    "new head alone": _HEAD,
    "linear probe": _HEAD,
    "lora": _LORA,
    "lora, unmerged": _LORA,
    "lora, merged": _MERGED,
    "prompts": _PROMPTS,
    "vpt": _PROMPTS,
    "frozen": _FROZEN,
    "before": _FROZEN,
    "adapter": _ADAPTER,
}
_COLORS = (GREY, SKY, PURPLE, GREEN, ORANGE, VERMILLION, BLUE, INK, YELLOW)
_GROUPS = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, INK)  # told apart without a marker, also beside grey
_MARKERS = "pP<>hd*8oDs^vX"
_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", "--", ":", "-.", _LONG, _DOUBLE)


def styles_for(names: Iterable[str]) -> dict[str, Style]:
    """Return the style of each method; no two of them look alike unless they are names of the same thing."""
    every = sorted(set(names), key=lambda name: (name.lower(), name))
    found = {name: _KNOWN[name.lower()] for name in every if name.lower() in _KNOWN}
    taken = set(found.values())
    free = (style for style in _others() if (style.color, style.marker) not in {(t.color, t.marker) for t in taken})
    unused = sorted(free, key=lambda style: style.color in {t.color for t in taken})  # a new colour first; it is stable
    for name, style in zip([name for name in every if name not in found], _endless(unused), strict=False):
        found[name] = style
    return found


def colors_for(groups: Iterable[str]) -> dict[str, str]:
    """Return the colours of groups within one picture, by their first appearance; those of methods as everywhere.

    Only as many as can be told apart by colour alone; groups beyond these have none.
    """
    every = list(dict.fromkeys(groups))
    known = {name: _KNOWN[name.lower()].color for name in every if name.lower() in _KNOWN}
    free = [color for color in _GROUPS if color not in known.values()]
    others = dict(zip([name for name in every if name not in known], free, strict=False))
    return {name: (known | others)[name] for name in every if name in known or name in others}


def _others() -> Iterable[Style]:
    """Yield combinations: every colour with a marker of its own, then again with the next marker."""
    for turn in range(len(_MARKERS)):
        for index, color in enumerate(_COLORS):
            marker = _MARKERS[(index + turn) % len(_MARKERS)]
            yield Style(color, marker, _DASHES[(index + turn) % len(_DASHES)])


def _endless(styles: list[Style]) -> Iterable[Style]:
    while True:
        yield from styles
