"""Raw samples as one Parquet file for each (cell, arm): what a reader needs to judge again without our code or our database."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from experiments.names import AA_ARM, BASELINE_ARM
from service.judge.results import SERIAL_CONTROL
from service.judge.samples import Trial
from workers.messages import Variant

TIME_COLUMNS = ("elapsed_us", "window_us", "gather_us", "wire_us", "late_us", "lateness_us", "filler_us", "enqueue_us")
"""What each rank saw of a trial, us; null where no gather ran."""


def arm_trials(trials: Iterable[Trial], arm: str) -> list[Trial]:
    """The trials of one arm and of its controls. The baseline's second copy, and the control arm that has no run of its own, go with it."""
    names = {arm, AA_ARM, SERIAL_CONTROL} if arm == BASELINE_ARM else {arm}
    return [trial for trial in trials if Variant.parse(trial.variant).arm in names]


def write_samples(path: Path, trials: Iterable[Trial], about: Mapping[str, str]) -> int:
    """Writes one row for each trial and rank, in the order of the records; the number of rows.

    Args:
        about: Identity, kept in the file's schema metadata under `cplab.*`, so that a file on its own still says what it is.

    Raises:
        OSError: The file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("launch", pa.int32()),
            ("block", pa.int32()),
            ("kind", pa.string()),
            ("row", pa.int32()),
            ("step", pa.int32()),
            ("variant", pa.string()),
            ("rank", pa.int32()),
            *((name, pa.float64()) for name in TIME_COLUMNS),
        ],
        metadata={f"cplab.{key}": value for key, value in about.items()},
    )
    columns: dict[str, list[object]] = {name: [] for name in schema.names}
    for trial in trials:
        ranks = len(trial.elapsed_us)
        for name in ("launch", "block", "kind", "row", "step", "variant"):
            columns[name] += [getattr(trial, name)] * ranks
        columns["rank"] += range(ranks)
        for name in TIME_COLUMNS:
            columns[name] += getattr(trial, name) or (None,) * ranks
    table = pa.table(columns, schema=schema)
    pq.write_table(table, path, compression="zstd")
    return int(table.num_rows)
