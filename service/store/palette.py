"""Colours of runs in MLflow's charts: an arm has one colour in every chart, so that bars can be told apart without reading their names."""

from __future__ import annotations

import colorsys

BASELINE_COLOR = "#8c959f"
_ARM_HUES = (0.58, 0.08, 0.36, 0.80, 0.95, 0.15, 0.48)
"""As far apart as seven hues go for most eyes, blue first."""


def arm_color(order: int, shade: float = 0.0) -> str:
    """The colour of an arm by its place among the arms, the baseline (grey) first.

    Args:
        shade: 0 to 1, darker to lighter: for several lines of one arm.
    """
    light = 0.38 + 0.34 * shade
    if order == 0:
        return _hex(colorsys.hls_to_rgb(0.58, light + 0.12, 0.06)) if shade else BASELINE_COLOR
    return _hex(colorsys.hls_to_rgb(_ARM_HUES[(order - 1) % len(_ARM_HUES)], light, 0.75))


def series_color(position: int, count: int) -> str:
    """One of `count` colours around the circle, neighbours alternating in lightness."""
    return _hex(colorsys.hls_to_rgb(position / max(count, 1), 0.36 if position % 2 else 0.52, 0.7))


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
