"""Unlocking: ends a frozen holder of the lease, and writes down in its sweep that and why."""

from __future__ import annotations

import getpass
import os

from experiments.errors import UserError
from experiments.names import SweepStatus
from service.run.cluster import ADDRESS_ENV_VAR, connect
from service.run.lease import unlock
from service.store.home import Home
from service.store.records import Records, UnknownSweepError


def unlock_cluster(home: Home, why: str, force: bool) -> str:
    """What was done, in one line.

    Raises:
        UserError: No shared cluster is named, no reason given, or the holder is alive.
        InfrastructureError: It could not be ended.
    """
    if not os.environ.get(ADDRESS_ENV_VAR):
        raise UserError(
            f"{ADDRESS_ENV_VAR} is not set: only a shared cluster has a lease; a run on its own cluster ends with its process"
        )
    if not why.strip():
        raise UserError("--why: say why that run is ended: its sweep keeps it")
    with connect():
        holder = unlock(force)
    if holder is None:
        return "the cluster is free"
    note = f"unlocked by {getpass.getuser()}: {why.strip()}"
    records = Records(home.records)
    try:
        if records.sweep(holder.sweep_id)["status"] == SweepStatus.RUNNING:
            records.end_sweep(holder.sweep_id, SweepStatus.KILLED, note)
    except UnknownSweepError:
        return f"ended {holder.words}; its records are under {holder.home}, and do not know of it"
    finally:
        records.close()
    return f"ended {holder.words}; `cplab run --resume {holder.sweep_id}` goes on with it"
