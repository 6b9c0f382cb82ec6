"""Shell of the pages: escaped titles, data that stays data, no request, one definition."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

import counterflow
from counterflow.report.pages.page import draw_page

HOSTILE = "</script><script>alert(1)</script> & <!--"


def test_titles_and_data_come_back_as_they_were_given() -> None:
    page = draw_page(HOSTILE, "<p>body</p>", script="run();", data={"name": HOSTILE})
    (title,) = re.findall(r"<title>(.*?)</title>", page)
    (heading,) = re.findall(r"<h1>(.*?)</h1>", page)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert html.unescape(title) == html.unescape(heading) == HOSTILE
    assert json.loads(data) == {"name": HOSTILE}
    assert page.count("<script") == 2


@pytest.mark.parametrize("script", ["", "run();"])
def test_a_page_may_request_nothing_and_runs_a_script_only_if_it_has_one(script: str) -> None:
    page = draw_page("title", "", style="p { margin: 0; }", script=script)
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy.startswith("default-src 'none'") and ("script-src" in policy) == bool(script)
    assert "prefers-color-scheme: dark" in page and "p { margin: 0; }" in page
    assert not re.search(r"<link|<img|@import|url\(|href|src=", page)


def test_all_pages_have_this_shell() -> None:
    root = Path(counterflow.__file__).parent
    folders = ("audit", "launcher", "plan", "report", "training", "verify")
    modules = [path for folder in folders for path in (root / folder).rglob("*.py")]
    shells = [path.relative_to(root) for path in modules if "<!doctype" in path.read_text(encoding="utf-8").lower()]
    assert shells == [Path("report/pages/page.py")]
