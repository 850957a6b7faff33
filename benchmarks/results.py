"""What scenarios find: figures by tool, with the ratio to envstore worked out in one place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import middle

OURS = "envstore"


@dataclass(frozen=True, slots=True)
class Metric:
    """Something measured for several tools; ``unit`` is ``s``, ``B`` or a plain noun."""

    name: str
    unit: str


@dataclass(slots=True)
class Result:
    """One scenario's figures.

    ``values`` holds, by metric and tool, one number for each repetition; ``absent`` why a tool
    has none; ``facts`` single numbers about the data; ``notes`` what a reader must know.
    """

    scenario: str
    title: str
    values: dict[Metric, dict[str, list[float]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, metric: Metric, tool: str, value: float) -> None:
        """Record one repetition."""
        self.values.setdefault(metric, {}).setdefault(tool, []).append(value)

    def median(self, metric: Metric, tool: str = OURS) -> float | None:
        """Return the median over the repetitions, None if there are none."""
        found = self.values.get(metric, {}).get(tool)
        return middle(found) if found else None

    def ratio(self, metric: Metric, tool: str) -> float | None:
        """Return how many times envstore's figure this one is, None if that says nothing."""
        own, other = self.median(metric), self.median(metric, tool)
        return other / own if own and other is not None else None

    def tools(self) -> list[str]:
        """Return all tools in the order in which they were first measured, envstore first."""
        seen = dict.fromkeys(tool for by_tool in self.values.values() for tool in by_tool)
        return sorted(seen, key=lambda tool: tool != OURS)

    def rows(self) -> Iterator[tuple[Metric, str, list[float], float | None]]:
        """Yield every metric of every tool with its repetitions and its ratio to envstore."""
        for metric, by_tool in self.values.items():
            for tool, found in by_tool.items():
                yield metric, tool, found, self.ratio(metric, tool)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "scenario": self.scenario,
            "title": self.title,
            "figures": [
                {
                    "metric": metric.name,
                    "unit": metric.unit,
                    "tool": tool,
                    "median": middle(found),
                    "min": min(found),
                    "max": max(found),
                    "values": found,
                    "ratio_to_envstore": ratio,
                }
                for metric, tool, found, ratio in self.rows()
            ],
            "absent": self.absent,
            "facts": self.facts,
            "notes": self.notes,
        }
