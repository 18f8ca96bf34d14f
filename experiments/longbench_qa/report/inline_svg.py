"""A matplotlib figure as an SVG element of the page."""

import io
import re
from html import escape
from typing import Any


def inline_svg(figure: Any, name: str, alt: str) -> str:
    """The element, with `alt` as its text for those who do not see it. `name` keeps its ids apart from other figures'.

    Text stays text, so that it can be searched and takes the page's font.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'\s(?:d|x|y|transform|points)="[^"]*"', lambda found: _rounded(found.group()), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1)


def _rounded(attribute: str) -> str:
    """Coordinates to a hundredth of a point: half the size, and nothing to see."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute)
