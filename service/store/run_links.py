"""Links between the runs of a sweep: sweep, cells, report, trace. Relative to the dashboard's page, so that they hold on any host and port."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from service.judge.results import CellResult, SweepResult


@dataclass(frozen=True)
class RunLinks:
    """Where the runs of one sweep are.

    Attributes:
        runs: `PlannedRun.key` -> run id.
        histories: (cell_id, arm) -> run id.
        traced: Ids of cells with a trace.
    """

    experiment_id: str
    sweep_id: str
    runs: Mapping[str, str]
    histories: Mapping[tuple[str, str], str] = field(default_factory=dict)
    traced: frozenset[str] = frozenset()

    def of_summary(self, result: SweepResult, max_bytes: int = 1800) -> str:
        """A line of links for the summary's note; only of the first cells, since a note has little room."""
        run_id = self.runs[f"{self.sweep_id}/summary"]
        cells: list[str] = []
        for cell in result.cells:
            cells.append(_link(cell.label, self._compare(cell)))
            max_bytes -= len(cells[-1].encode()) + 4
            if max_bytes < 0:
                break
        more = len(result.cells) - len(cells)
        lines = [
            f"Open: {self._artifact('report', run_id, 'report.html')} · {self._artifact('full table', run_id, 'table.md')}"
            f" · {self._artifact('result', run_id, 'result.json')}",
            f"Cells, both arms side by side: {' · '.join(cells)}{f' · and {more} more' if more > 0 else ''}",
        ]
        return "\n\n".join(lines)

    def of_sweep(self) -> str:
        """For runs that are no measurement of their own."""
        return f"Open: {_link('sweep', self._run(self.runs[f'{self.sweep_id}/summary']))}"

    def of_arm(self, cell: CellResult, arm: str) -> str:
        """A line of links for an arm's note."""
        cell_id = str(cell.cell["cell_id"])
        own, summary = self.runs[f"{self.sweep_id}/{cell_id}/{arm}"], self.runs[f"{self.sweep_id}/summary"]
        found = [_link("sweep", self._run(summary)), self._artifact("report", summary, "report.html")]
        if cell_id in self.traced:
            found += [self._artifact("trace", own, "trace.json"), self._artifact("lanes", own, "lanes.png")]
        found += [
            *(_link(name, self._run(run_id)) for name, run_id in self._arms(cell).items() if name != arm),
            _link("arms side by side", self._compare(cell)),
        ]
        if (cell_id, arm) in self.histories:
            found.append(_link("over nights", f"{self._run(self.histories[cell_id, arm])}/model-metrics"))
        return f"Open: {' · '.join(found)}"

    def of_history(self, cell_id: str, arm: str) -> str:
        """A line of links for a history's note: into its last night."""
        summary = self.runs[f"{self.sweep_id}/summary"]
        found = [_link("last night", self._run(summary)), self._artifact("its report", summary, "report.html")]
        if (own := self.runs.get(f"{self.sweep_id}/{cell_id}/{arm}")) is not None:
            found.append(_link(f"{arm} in it", self._run(own)))
        return f"Open: {' · '.join(found)}"

    def _arms(self, cell: CellResult) -> dict[str, str]:
        keys = {arm.arm: f"{self.sweep_id}/{cell.cell['cell_id']}/{arm.arm}" for arm in cell.arms}
        return {name: self.runs[key] for name, key in keys.items() if key in self.runs}

    def _run(self, run_id: str) -> str:
        return f"#/experiments/{self.experiment_id}/runs/{run_id}"

    def _artifact(self, text: str, run_id: str, name: str) -> str:
        return _link(text, f"{self._run(run_id)}/artifacts/{name}")

    def _compare(self, cell: CellResult) -> str:
        return compare_link(self.experiment_id, list(self._arms(cell).values()))


def compare_link(experiment_id: str, run_ids: Sequence[str]) -> str:
    """MLflow's page that sets runs side by side."""
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), [experiment_id]))
    return f"#/compare-runs?runs={runs}&experiments={experiments}"


def _link(text: str, target: str) -> str:
    return f"[{text}]({target})"
