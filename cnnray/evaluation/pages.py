"""What the HTML files have in common: templates that escape, and pictures inside the page.

Keys, class names and facts are hostile text: the templates escape them, and ``printable`` shows
control characters as escapes. The pages run no script and load nothing.
"""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cnnray.evaluation import figures
from cnnray.evaluation.figures import printable


@dataclass(frozen=True)
class Picture:
    """An embedded image: its data URI, and the size in CSS pixels that it is shown at."""

    uri: str
    width: int
    height: int


def render_page(template: str, **values: Any) -> str:
    """Render one of the package's templates."""
    environment = Environment(
        loader=PackageLoader("cnnray.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, "percent": percent}
    return environment.get_template(template).render(**values)


def picture(png: bytes) -> Picture:
    """A figure at its natural size: 96 CSS pixels an inch."""
    width, height = struct.unpack(">II", png[16:24])  # the IHDR chunk comes first
    scale = 96 / figures.DPI
    return Picture(data_uri(png, kind="png"), round(width * scale), round(height * scale))


def data_uri(data: bytes, *, kind: str) -> str:
    """An image's bytes as an address: ``kind`` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def percent(fraction: float | None) -> str:
    """A fraction for people; a dash where it is undefined."""
    return "–" if fraction is None else f"{fraction:.1%}"
