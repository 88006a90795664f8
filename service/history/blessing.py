"""The blessed night: the reference that people have looked at and accepted. A tag that moves, and a log of where it has been."""

from __future__ import annotations

import getpass
import time

from experiments.errors import UserError
from service.history.nights import NIGHT, nights_of
from service.history.store import Blessing, NightStore
from service.store.records import Records


def bless(records: Records, store: NightStore, sweep_id: str, why: str) -> tuple[str, Blessing]:
    """Moves an experiment's tag to that sweep: what its night, or one before it, began is accepted from now on.

    Raises:
        UserError: The sweep is no finished night, or there is no reason.
    """
    why = " ".join(why.split())
    if not why:
        raise UserError("--why: say in a few words why this night is the reference: the log keeps it")
    row = records.sweep(sweep_id)
    experiment, night = str(row["experiment"]), row["environment"].get(NIGHT)
    if not night:
        raise UserError(f"SWEEP: {sweep_id} is no night: only `cplab nightly` makes one")
    if sweep_id not in {found.sweep_id for found in nights_of(records, experiment)}:
        raise UserError(f"SWEEP: {sweep_id} does not stand for the night {night}: it did not finish, or was measured again later")
    blessing = Blessing(str(night), sweep_id, why, _who(), time.time())
    store.bless(experiment, blessing)
    return experiment, blessing


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
