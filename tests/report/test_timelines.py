"""Drawn timelines show every action with its times, on the page and in the terminal."""

from __future__ import annotations

import base64
import html
import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from counterflow.parallel.schedule.actions import Action, Overlap, Schedule, parts
from counterflow.parallel.schedule.catalogue import find_schedule, schedule_names
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.parallel.schedule.timeline import Span, Timeline
from counterflow.report.pages.timeline import draw_html
from counterflow.report.text.timeline import draw_text


def simulated(name: str, ranks: int, microbatches: int, unit: float = 10.0) -> Timeline:
    schedule = find_schedule(name)(ranks, microbatches)
    return simulate(schedule, Costs.uniform(schedule.num_stages, unit, unit, unit, 2.5 * unit))


def jittered(timeline: Timeline, seed: int) -> Timeline:
    """Timeline like a measured one: times without a common tick, gaps between all actions."""
    draw = random.Random(seed)
    spans = []
    for rank in timeline.spans:
        moved, clock = [], 0.0
        for action, start, end in rank:
            begin = max(clock, start) + draw.random() * 0.3
            clock = begin + (end - start) * draw.uniform(0.9, 1.1)
            moved.append(Span(action, begin, clock))
        spans.append(tuple(moved))
    return Timeline(timeline.schedule, tuple(spans), timeline.peak_microbatches)


def embedded(page: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def numbers(packed: str) -> Iterator[int]:
    value = shift = 0
    for byte in base64.b64decode(packed):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0


def read_spans(drawn: dict[str, Any], rank: int) -> Iterator[Span]:
    """Actions of a rank, read from the format that the docstring of pages/timeline.py describes."""
    values, stages = numbers(drawn["spans"][rank]), drawn["placement"][rank]
    following: dict[tuple[int, str], int] = {}

    def signed() -> int:
        value = next(values)
        return -(value + 1) // 2 if value % 2 else value // 2

    def action(kind: str, chunk: int) -> Action:
        key = chunk, kind.replace("I", "B")
        microbatch = following.get(key, 0) + signed()
        following[key] = microbatch + 1
        return Action(kind, stages[chunk], microbatch)

    clock = 0
    for code in values:
        rest, kind = divmod(code, 6)
        later, first = divmod(rest, drawn["chunks"])
        single = action("F", first) if kind > 3 else action("FIWB"[kind], first)
        work = Overlap(single, action("BI"[kind - 4], later)) if kind > 3 else single
        start = clock + signed()
        clock = start + next(values)
        yield Span(work, start * drawn["tick"], clock * drawn["tick"])


def assert_same(drawn: dict[str, Any], timeline: Timeline) -> None:
    exact = timeline.step_time * 1e-9
    for rank, spans in enumerate(timeline.spans):
        read = list(read_spans(drawn, rank))
        assert drawn["actions"][rank] == len(read)
        assert [span.action for span in read] == [span.action for span in spans]
        for shown, given in zip(read, spans, strict=True):
            assert abs(shown.start - given.start) <= exact and abs(shown.end - given.end) <= exact


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize("measured", [False, True])
def test_the_page_holds_every_action_once_at_its_times(name: str, measured: bool) -> None:
    timeline = simulated(name, 4, 12)
    timeline = jittered(timeline, seed=3) if measured else timeline
    (drawn,) = embedded(draw_html([(name, timeline)]))["timelines"]
    assert_same(drawn, timeline)
    done = [part for rank in range(4) for span in read_spans(drawn, rank) for part in parts(span.action)]
    whole = [(a.stage, a.microbatch) for a in done if a.kind == "F"]
    assert sorted(whole) == [(s, m) for s in range(timeline.schedule.num_stages) for m in range(12)]
    assert drawn["step"] == timeline.step_time and drawn["peak"] == list(timeline.peak_microbatches)


@pytest.mark.parametrize("unit", [1e-4, 1 / 3, 0.7, 1e6])
def test_times_of_any_size_keep_nine_digits(unit: float) -> None:
    timeline = simulated("dualpipe", 4, 10, unit)
    assert_same(embedded(draw_html([("x", timeline)]))["timelines"][0], timeline)


def test_a_schedule_of_many_chunks_and_idle_ranks_is_drawn() -> None:
    stages = 40
    forwards = tuple(Span(Action("F", stage, 0), float(stage), stage + 1.0) for stage in range(stages))
    backward = Span(Overlap(Action("F", 0, 300), Action("I", 39, 70000)), 40.0, 43.0)
    weights = Span(Action("W", 39, 70000), 43.0, 43.0)
    spans = ((*forwards, backward, weights), ())
    schedule = Schedule("own", 2, stages, 70001, (tuple(range(stages)), ()), ((), ()))
    timeline = Timeline(schedule, spans, (3, 0))
    assert_same(embedded(draw_html([("own", timeline)]))["timelines"][0], timeline)
    assert max(map(len, draw_text(timeline).splitlines())) <= 80


def test_timelines_without_any_time_are_drawn() -> None:
    empty = Timeline(Schedule("empty", 1, 1, 1, ((0,),), ((),)), ((),), (0,))
    assert embedded(draw_html([("empty", empty)]))["timelines"][0]["actions"] == [0]
    assert "bubble 0.0%" in draw_text(empty)


def test_compared_timelines_stand_under_each_other_in_order() -> None:
    given = [(name, simulated(name, 4, 8)) for name in schedule_names()]
    page = draw_html(given, unit="ms")
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == [name for name, _ in given]
    for (_, timeline), drawn in zip(given, embedded(page)["timelines"], strict=True):
        assert_same(drawn, timeline)


class Elements(HTMLParser):
    """Elements of a page in order, and the elements that are still open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b", "<!--", "\u2028 ü 流"]
)
def test_names_and_notes_cannot_add_elements(name: str) -> None:
    timeline = simulated("1f1b", 2, 4)
    plain = Elements(draw_html([("plain", timeline)], unit="ms", notes=["note"], title="title"))
    hostile = draw_html([(name, timeline)], unit=name, notes=[name], title=name)
    read = Elements(hostile)
    assert read.tags == plain.tags and not read.open
    assert embedded(hostile)["unit"] == name
    assert html.unescape(re.findall(r"<h2[^>]*>(.*?)</h2>", hostile)[0]) == name
    assert read.text.count(name) >= 4  # title, heading, note and name, all unchanged


def test_the_page_needs_no_network() -> None:
    page = draw_html([("dualpipe", simulated("dualpipe", 4, 8))])
    for request in ("://", "@import", "url(", "src=", "href=", "fetch(", "XMLHttpRequest", "import("):
        assert request not in page
    assert "default-src 'none'" in page


def test_the_page_grows_by_a_few_bytes_per_action() -> None:
    def cost(timeline: Timeline) -> float:
        fewer = simulated("zb1p", 8, 1)
        grown = len(draw_html([("x", timeline)])) - len(draw_html([("x", fewer)]))
        return grown / sum(len(spans) for spans in timeline.spans)

    timeline = simulated("zb1p", 8, 512)
    assert cost(timeline) < 6  # half a million: 3 MB
    assert cost(jittered(timeline, seed=1)) < 14


def test_the_same_timelines_give_the_same_page_and_picture() -> None:
    first, second = simulated("dualpipe", 4, 8), simulated("dualpipe", 4, 8)
    assert draw_html([("a", first)]) == draw_html([("a", second)])
    assert draw_text(first) == draw_text(second)


def drawn_rows(picture: str) -> dict[int, str]:
    """Rows of a picture by rank: the text between the bars."""
    return {int(rank): row for rank, row in re.findall(r"^ *(\d+) \|(.*)\|", picture, re.MULTILINE)}


SIZES = [(2, 4), (4, 8), (8, 20), (4, 300), (16, 40), (36, 72)]


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_text_pictures_fit_and_show_the_idle_share(name: str, ranks: int, microbatches: int) -> None:
    timeline = simulated(name, ranks, microbatches)
    bubble, step = timeline.bubble, timeline.step_time
    for width in (40, 80, 131):
        picture = draw_text(timeline, width, unit="ms")
        assert picture.isascii()
        assert all(len(line) <= width and line == line.rstrip() for line in picture.splitlines())
        assert len(picture.splitlines()) <= 50
        rows = drawn_rows(picture)
        assert list(rows) == (list(range(ranks)) if ranks <= 32 else [*range(16), *range(ranks - 16, ranks)])
        for rank, row in rows.items():
            assert abs(row.count(".") - bubble[rank] / step * len(row)) <= 4  # columns


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p", "dualpipe"])
def test_wide_boxes_name_the_rank_s_actions_in_order(name: str) -> None:
    timeline = simulated(name, 2, 6)
    for rank, row in drawn_rows(draw_text(timeline, 400)).items():
        expected = [
            f"X{a.forward.microbatch}/{a.backward.microbatch}" if isinstance(a, Overlap) else f"{a.kind}{a.microbatch}"
            for a, *_ in timeline.spans[rank]
        ]
        assert re.findall(r"[A-Z][\d/]+", row) == expected
        scale = len(row) / timeline.step_time
        starts = [found.start() for found in re.finditer("[A-Z]", row)]
        for column, span in zip(starts, timeline.spans[rank], strict=True):
            assert abs(column - span.start * scale) <= 0.5 + 1e-6


def test_narrow_boxes_give_every_kind_its_share_of_the_row() -> None:
    timeline = simulated("zb1p", 4, 400)
    for rank, row in drawn_rows(draw_text(timeline)).items():
        for kind in "FIW":
            time = sum(end - start for action, start, end in timeline.spans[rank] if str(action).startswith(kind))
            assert abs(row.count(kind) - time / timeline.step_time * len(row)) <= 3


def test_the_picture_s_figures_are_the_timeline_s() -> None:
    timeline = simulated("dualpipe", 8, 20)
    picture = " ".join(draw_text(timeline, unit="ms").split())
    assert picture.startswith(
        "dualpipe: 8 ranks, 8 stages, 20 micro-batches; step 590 ms, bubble 7.0%, 2 copies of the "
    )
    page = re.sub("<[^>]*>", "", draw_html([("dualpipe", timeline)], unit="ms"))
    assert "step 590 ms" in page and "bubble 7.0%" in page and "copies of the parameters 2" in page
