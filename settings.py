"""Building blocks of the configuration: sections, keys, schedules and errors.

Each folder owns its section as a `Section` in its own `config.py`. Each key is defined once, by `key(...)`: type,
default, unit and one line of help stand together. `configs/config.py` composes the sections, and
`counterflow config CONFIG --explain` prints the help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict


class UsageError(ValueError):
    """Input of the user that cannot work as given; the launcher prints the message and exits with 2."""


class Clash(NamedTuple):
    """Values of a section that do not go together.

    `keys` are the dotted paths, below the section, of all keys involved; the faulty key comes first. `message` states
    the fault of that key's value and is printed after the key: Clash(("ep", "dp"), "3 does not divide dp 8").
    """

    keys: tuple[str, ...]
    message: str


class SectionFaults(ValueError):
    """Clashes between the keys of a section; the loader gives each clash a separate line."""

    def __init__(self, clashes: Sequence[Clash]) -> None:
        self.clashes = tuple(clashes)
        super().__init__("; ".join(f"{clash.keys[0]} {clash.message}" for clash in clashes))


class Section(BaseModel):
    """A section of the configuration: immutable; a key that is not defined is a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def key(default: Any, help: str, unit: str | None = None, **constraints: Any) -> Any:
    """Define a configuration key: its default, one line of help, its unit and its bounds."""
    extra: JsonDict | None = {"unit": unit} if unit else None
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def nearest_multiples(wanted: int, unit: int, least: int = 1) -> str:
    """The multiples of `unit` next to `wanted`, one on each side, none below `least`: "64 or 72"."""
    lowest = -(-max(least, 1) // unit) * unit
    around = ((wanted - 1) // unit * unit, (wanted // unit + 1) * unit)
    return " or ".join(str(value) for value in sorted({max(value, lowest) for value in around} - {wanted}))


def nearest_divisors(wanted: int, number: int) -> str:
    """The divisors of `number` next to `wanted`, one on each side where there is one: "2 or 4"."""
    divisors = [value for value in range(1, number + 1) if number % value == 0]
    below = [value for value in divisors if value < wanted]
    above = [value for value in divisors if value > wanted]
    return " or ".join(str(value) for value in (*below[-1:], *above[:1]))


class Phase(Section):
    """A stretch of training in which a value is constant or moves from `start` to `end`."""

    tokens: float | None = key(None, "length of the phase; the last one may leave it out", unit="tokens", gt=0)
    value: float | None = key(None, "the value, when it is constant in this phase", ge=0)
    start: float | None = key(None, "value at the beginning of the phase", ge=0)
    end: float | None = key(None, "value at the end of the phase", ge=0)
    shape: Literal["linear", "cosine"] = key("linear", "how the value moves from start to end")

    @model_validator(mode="after")
    def _one_form(self) -> Phase:
        constant = self.value is not None
        moving = self.start is not None and self.end is not None
        if constant == moving or (constant and (self.start is not None or self.end is not None)):
            raise ValueError("a phase takes either `value` or both `start` and `end`")
        if moving and self.tokens is None:
            raise ValueError("a phase that moves from `start` to `end` needs its length in `tokens`")
        return self

    def at(self, tokens_into_phase: float) -> float:
        """Value after `tokens_into_phase` tokens of this phase."""
        if self.value is not None:
            return self.value
        assert self.start is not None and self.end is not None and self.tokens is not None
        done = min(1.0, tokens_into_phase / self.tokens)
        if self.shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return self.start + (self.end - self.start) * done


class TokenSchedule(Section):
    """A value as a function of the tokens seen so far: a number, or a list of phases.

    In YAML a bare number or a bare list of phases is enough. After the last phase its final value stays.
    """

    phases: tuple[Phase, ...] = key(..., "phases in order", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _accept_short_forms(cls, given: Any) -> Any:
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return {"phases": ({"value": given},)}
        if isinstance(given, (list, tuple)):
            return {"phases": tuple(given)}
        if isinstance(given, dict) and "phases" not in given and given.keys() & Phase.model_fields.keys():
            raise ValueError("expects a number or a list of phases: put `- ` before a phase, also before a single one")
        if isinstance(given, cls) or (isinstance(given, dict) and "phases" in given):
            return given
        shown = "a mapping" if isinstance(given, dict) else "null" if given is None else repr(given)
        raise ValueError(f"expects a number or a list of phases, got {shown}")

    @model_validator(mode="after")
    def _only_the_last_is_open(self) -> TokenSchedule:
        for index, phase in enumerate(self.phases[:-1]):
            if phase.tokens is None:
                raise ValueError(f"phase {index} needs its length in `tokens`: only the last phase may leave it out")
        return self

    def at(self, tokens: float) -> float:
        """Value after `tokens` tokens of training."""
        for phase in self.phases:
            if phase.tokens is None or tokens < phase.tokens:
                return phase.at(tokens)
            tokens -= phase.tokens
        last = self.phases[-1]
        assert last.tokens is not None
        return last.at(last.tokens)

    @property
    def total_tokens(self) -> float:
        """Length of all phases together, infinite where the last is open."""
        return sum(math.inf if phase.tokens is None else phase.tokens for phase in self.phases)
