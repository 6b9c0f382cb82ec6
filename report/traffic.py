"""Traffic between the ranks of a run in a step: bytes and messages, by purpose, collective and link."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from .text.numbers import format_bytes, format_count


class Sent(BaseModel):
    """Traffic of one kind from all ranks together in a step. Payload, without the additions of protocols."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    purpose: str  # a key of comm.meter.PURPOSES
    collective: str
    link: Literal["within", "between"]  # nodes
    bytes: int
    messages: int


def bytes_over(sent: Iterable[Sent], link: Literal["within", "between"]) -> int:
    """Sum of the bytes sent over this kind of link."""
    return sum(each.bytes for each in sent if each.link == link)


def mean_step(steps: Sequence[Sequence[Sent]]) -> list[Sent]:
    """Mean of several steps, rounded to whole bytes and messages, in the order in which kinds first appear."""
    sums: dict[tuple[str, str, Literal["within", "between"]], tuple[int, int]] = {}
    for sent in steps:
        for each in sent:
            key = each.purpose, each.collective, each.link
            bytes, messages = sums.get(key, (0, 0))
            sums[key] = bytes + each.bytes, messages + each.messages
    number = max(1, len(steps))
    return [
        Sent(
            purpose=purpose,
            collective=collective,
            link=link,
            bytes=round(bytes / number),
            messages=round(messages / number),
        )
        for (purpose, collective, link), (bytes, messages) in sums.items()
    ]


HEADER = ("", "collective", "within nodes", "messages", "between nodes", "messages")


def traffic_table(sent: Sequence[Sent]) -> list[tuple[str, ...]]:
    """Rows of text under `HEADER`, one per purpose and collective, and their sum."""
    rows: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for each in sent:
        rows.setdefault((each.purpose, each.collective), {})[each.link] = each.bytes, each.messages
    table = [(purpose, collective, *_cells(links)) for (purpose, collective), links in rows.items()]
    total: dict[str, tuple[int, int]] = {}
    for links in rows.values():
        for link, (bytes, messages) in links.items():
            total_bytes, total_messages = total.get(link, (0, 0))
            total[link] = total_bytes + bytes, total_messages + messages
    return [*table, ("all", "", *_cells(total))] if len(table) > 1 else list(table)


def _cells(links: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    cells: list[str] = []
    for link in ("within", "between"):
        bytes, messages = links.get(link, (0, 0))
        cells += [format_bytes(bytes), format_count(messages)] if bytes or messages else ["-", "-"]
    return tuple(cells)


def describe_traffic(sent: Sequence[Sent]) -> str:
    """Summary in one line: the bytes that a step sends over each kind of link."""
    between, within = bytes_over(sent, "between"), bytes_over(sent, "within")
    if not within and not between:
        return "nothing is sent"
    links = ("within", within), ("between", between)
    phrases = [f"{format_bytes(bytes)} {link} nodes" for link, bytes in links if bytes]
    phrases[0] += " per step"
    if between:
        largest = max((each for each in sent if each.link == "between"), key=lambda each: each.bytes)
        phrases.append(f"most of it {largest.purpose} ({largest.bytes / between:.0%})")
    return ", ".join(phrases)
