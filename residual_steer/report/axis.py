"""What every picture has in common: its axes, and that it can be written to a file or shown in a notebook."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from residual_steer.errors import SteerError
from residual_steer.files import as_path, make_folder, write_whole

from .schema import check_fields

if TYPE_CHECKING:
    from .pictures import Picture

__all__ = ["Axis", "Drawn"]


@dataclass(frozen=True)
class Axis:
    """An axis of a picture.

    Attributes:
        label: what it shows.
        unit: behind the label; "" for none.
        log: whether it is logarithmic, which bars ignore along x, and a heat map along x and y.
    """

    label: str
    unit: str = ""
    log: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        """Write the label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


class Drawn:
    """A picture, which draws itself with matplotlib.

    The drawing is imported where it is used: it needs the classes of pictures, which begin here.
    """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture, whole or not at all, as SVG or PNG by the name's ending.

        Raises:
            SteerError: the name ends otherwise; matplotlib is not installed; the file cannot be written.
        """
        from .plots import png, svg

        place, picture = as_path(path), cast("Picture", self)
        kind = place.suffix.lower()
        if kind not in {".svg", ".png"}:
            raise SteerError(f"a picture is written as .svg or .png; received {place}.")
        content = svg(picture).encode() if kind == ".svg" else png(picture)
        make_folder(place.parent)
        write_whole({place: content})

    def _repr_svg_(self) -> str | None:
        """Show the picture in a notebook, which writes its fields instead where matplotlib is missing."""
        from .plots import svg

        try:
            return svg(cast("Picture", self))
        except SteerError:
            return None
