"""CPLAB_HOME: the folder on the head node's local disk that holds the records, the embedded tracking store and the artifacts."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UserError

HOME_ENV_VAR = "CPLAB_HOME"
DEFAULT_HOME = "~/.cplab"
TRACKING_ENV_VAR = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class Home:
    """Absolute paths of what lives there."""

    folder: Path

    @property
    def records(self) -> Path:
        return self.folder / "records.db"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def calibration(self) -> Path:
        """Records of `cplab calibrate`: hundreds of sweeps that are nobody's results."""
        return self.folder / "calibration.db"

    @property
    def traces(self) -> Path:
        return self.folder / "traces"

    @property
    def tracking_uri(self) -> str:
        """MLFLOW_TRACKING_URI, or the embedded SQLite store."""
        return os.environ.get(TRACKING_ENV_VAR) or f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def is_embedded(self) -> bool:
        return not os.environ.get(TRACKING_ENV_VAR)


def is_explicit() -> bool:
    """Whether the user said where the home is."""
    return bool(os.environ.get(HOME_ENV_VAR))


def open_home() -> Home:
    """The home, made when it is not there and proven writable.

    Raises:
        UserError: It cannot be made or written.
    """
    folder = Path(os.environ.get(HOME_ENV_VAR) or DEFAULT_HOME).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise UserError(
            f"{HOME_ENV_VAR}: {str(folder)!r} cannot be written: {error.strerror or error}; set it to a local folder"
        ) from None
    return Home(folder)
