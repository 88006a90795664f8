"""Charts of the prepared views, in the words of MLflow 3.17's dashboard: sections, and cards in them.

A card's title is its metric. The dashboard adds a card for every metric that has none, into the section that its prefix names: those sections are
listed too, closed, below ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

OTHER_SECTIONS = (
    *("ratio", "speed", "latency", "account", "gather", "aa", "check", "samples", "filler", "length", "nights", "sweep"),
    *("verdicts", "Model metrics", "System metrics"),
)
"""The prefixes of every metric that is published, and MLflow's own two."""


def section(name: str, is_open: bool = True) -> dict[str, Any]:
    """One accordion of the charts' page."""
    return {
        "uuid": f"cplab-{name}",
        "name": name,
        "display": is_open,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        # Three in a row, MLflow's own choice, leave titles no room beside its side panel.
        "columns": 2,
        "cardHeight": 300,
    }


def bars(place: str, metric: str) -> dict[str, Any]:
    """One bar a run that has the metric."""
    return {**_card("BAR", place, metric), "runsCountToCompare": 100}


def lines(place: str, metrics: Sequence[str], by_time: bool = False) -> dict[str, Any]:
    """One line a run and metric; over steps, or over dates."""
    return {
        **_card("LINE", place, metrics[0]),
        "selectedMetricKeys": list(metrics),
        "xAxisKey": "time" if by_time else "step",
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "displayPoints": True,
        "ignoreOutliers": False,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "selectedXAxisMetricKey": "",
    }


def _card(kind: str, place: str, metric: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"cplab-{place}-{metric}",
        "metricSectionId": f"cplab-{place}",
        "metricKey": metric,
        "deleted": False,
        "isGenerated": False,
    }


def chart_state(cards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The part of a view's state that holds charts: the sections of `cards` in their order, then all others, closed."""
    shown = list(cards)
    ours = dict.fromkeys(card["metricSectionId"].removeprefix("cplab-") for card in shown)
    others = [name for name in OTHER_SECTIONS if name not in ours]
    return {
        "compareRunCharts": shown,
        "compareRunSections": [*(section(name) for name in ours), *(section(name, is_open=False) for name in others)],
        # Without it MLflow sorts the sections by name.
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
    }
