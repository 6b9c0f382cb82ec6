"""Shell of all HTML pages: head, common style, colours for light and dark.

Style sheets and scripts lie beside the modules, as files of the package. They are written into the page, so that a page
is one file. A browser requests nothing else for it, and the page's security policy forbids requests.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def draw_page(title: str, body: str, style: str = "", script: str = "", data: Any = None) -> str:
    """Draw a whole page: `title` as text in the head and as the heading, then `body`, which is HTML.

    `style` is CSS that follows the common sheet. `script` is JavaScript that runs at the end; it finds `data`, unless
    None, as JSON in the element `data`. Neither `body`, `style` nor `script` is escaped here.
    """
    policy = f"{_POLICY}; script-src 'unsafe-inline'" if script else _POLICY
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{read_asset(__package__, 'page.css')}{style}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        body.strip("\n"),
    ]
    if data is not None:
        parts.append(f'<script type="application/json" id="data">{_embedded(data)}</script>')
    if script:
        parts.append(f"<script>\n{script}</script>")
    return "\n".join([*parts, "</body>", "</html>", ""])


def read_asset(package: str, name: str) -> str:
    """Text of a style sheet or script that is installed in `package`."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON without any character that could end the script element around it or begin another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
