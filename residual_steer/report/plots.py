"""Pictures as SVG and PNG. With one version of matplotlib, equal pictures are equal bytes, whatever the user set.

Each class of picture is drawn in a module of its own, which has the same four functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from . import charts, contours, heatmap, quivers
from .canvas import DPI, picture_bytes, settings
from .pictures import Arrows, Matrix, Picture, Surface
from .series import Plot
from .styles import Style, styles_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "alt_text", "draw", "png", "remarks", "styles_of", "svg"]


class _Drawing(Protocol):
    """A module that draws one class of picture."""

    def figure(self, picture: Any, styles: Mapping[str, Style], /) -> Figure:
        """Draw it."""

    def names(self, picture: Any, /) -> list[str]:
        """Return the methods whose styles it uses."""

    def describe(self, picture: Any, /) -> str:
        """Describe it in a sentence or two."""

    def remarks(self, picture: Any, /) -> list[str]:
        """Return notes on how it is drawn."""


_DRAWN: Mapping[type, _Drawing] = {Plot: charts, Matrix: heatmap, Surface: contours, Arrows: quivers}


def svg(picture: Picture, styles: Mapping[str, Style] | None = None) -> str:
    """Return a picture as SVG, which has its title.

    Args:
        picture: what is drawn.
        styles: of the methods, as `styles_of` returns them for a whole report; from the picture alone if left out.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with settings():
        bare = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawn = picture_bytes(_figure(picture, styles), "svg", metadata=bare, dpi=DPI).decode()
    return re.sub(r"(<svg\b[^>]*>)", lambda head: f"{head[1]}\n <title>{escape(picture.title)}</title>", drawn, count=1)


def png(picture: Picture, styles: Mapping[str, Style] | None = None) -> bytes:
    """Return a picture as PNG; `styles` as `svg` takes them.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with settings():
        return picture_bytes(_figure(picture, styles), "png", dpi=DPI, metadata={"Software": None})


def draw(picture: Picture, styles: Mapping[str, Style] | None = None) -> Figure:
    """Return a picture as a matplotlib figure, which belongs to no pyplot and no backend.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with settings():
        return _figure(picture, styles)


def styles_of(pictures: Iterable[Picture]) -> dict[str, Style]:
    """Return the style of each method in some pictures."""
    return styles_for(name for picture in pictures for name in _DRAWN[type(picture)].names(picture))


def alt_text(picture: Picture) -> str:
    """Describe a picture in a sentence or two to those who cannot see it."""
    return f"{picture.title}. {_DRAWN[type(picture)].describe(picture)}"


def remarks(picture: Picture) -> list[str]:
    """Return notes on how a picture is drawn, such as what was left out."""
    return _DRAWN[type(picture)].remarks(picture)


def _figure(picture: Picture, styles: Mapping[str, Style] | None) -> Figure:
    return _DRAWN[type(picture)].figure(picture, styles or styles_of([picture]))
