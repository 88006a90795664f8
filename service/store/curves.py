"""Curves: what an arm does over prompt lengths, as runs whose metrics are stepped by new tokens. A line needs its points in one run, and every cell
is a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.judge.results import ArmResult, CellResult, SweepResult
from service.store.columns import shape


@dataclass(frozen=True)
class Curve:
    """One arm over the lengths of cells that differ in nothing else.

    Attributes:
        label: The cells', without the length.
        points: new tokens -> the cell and the arm's result in it, shortest first; two at least.
        order: The arm's place among the arms.
    """

    arm: str
    label: str
    order: int
    points: Mapping[int, tuple[CellResult, ArmResult]]

    @property
    def values(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> (new tokens, value)."""
        found: dict[str, list[tuple[int, float]]] = {}
        for tokens, (_, arm) in self.points.items():
            figures = {
                "length/tok_s": arm.tokens_per_s,
                "length/ratio": arm.comparison.ratio.estimate if arm.comparison is not None else None,
                "length/exp_us": arm.account.exposed_us.estimate if arm.account is not None else None,
            }
            for name, value in figures.items():
                if value is not None:
                    found.setdefault(name, []).append((tokens, value))
        return found


def curves_of(result: SweepResult) -> list[Curve]:
    """Every arm's curves; none of a replay, of an INVALID cell, or where cells of one length differ in something that their labels do not say."""
    groups: dict[str, list[CellResult]] = {}
    for cell in result.cells:
        if not cell.is_invalid and not cell.cell.get("is_replay"):
            groups.setdefault(_rest(cell), []).append(cell)
    return [
        curve
        for label, cells in groups.items()
        if len({cell.cell["new_tokens"] for cell in cells}) == len(cells) > 1
        for curve in _of_group(label, cells)
    ]


def _of_group(label: str, cells: Sequence[CellResult]) -> list[Curve]:
    ordered = sorted(cells, key=lambda cell: int(cell.cell["new_tokens"]))
    names = [arm.arm for arm in ordered[0].arms]
    curves = []
    for order, name in enumerate(names):
        points = {
            int(cell.cell["new_tokens"]): (cell, arm)
            for cell in ordered
            for arm in cell.arms
            if arm.arm == name and arm.tokens_per_s
        }
        if len(points) > 1:
            curves.append(Curve(name, label, order, points))
    return curves


def _rest(cell: CellResult) -> str:
    """A cell's label without its workload; cells of several prefixes stay apart."""
    prefix = int(cell.cell.get("prefix_tokens", 0))
    rest = cell.label.replace(f"{cell.cell['workload']}-", "", 1)
    return f"{rest}-prefix{prefix}" if prefix else rest


def curve_shape(curve: Curve) -> str:
    """For the table's column."""
    return shape(curve.label).replace("cp", "*x", 1)
