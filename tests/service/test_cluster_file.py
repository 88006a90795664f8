"""`ray_cluster.yaml` is one that the cluster launcher takes, and says what a site relies on. `make test-hosts` brings a cluster up with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def starts(config, kind):
    return [command for command in config[f"{kind}_start_ray_commands"] if "ray start" in command]


VALIDATE = """
import json, sys
from ray.autoscaler._private.util import prepare_config, validate_config
prepared = prepare_config(json.load(sys.stdin))
validate_config(prepared)
print(json.dumps([(kind["min_workers"], kind["max_workers"]) for kind in prepared["available_node_types"].values()]))
"""


def test_the_launcher_takes_it(config):
    # In a process of its own: Ray reads how to authenticate once in a process, and other tests need it otherwise.
    done = subprocess.run([sys.executable, "-c", VALIDATE], input=json.dumps(config), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[len(config["provider"]["worker_ips"])] * 2]


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_host_asks_for_the_token_and_renices_nothing(config, kind):
    (command,) = starts(config, kind)
    for setting in ("RAY_AUTH_MODE=token", "RAY_worker_niceness=0", "RAY_USAGE_STATS_ENABLED=0", "NCCL_DEBUG=WARN"):
        assert setting in command.split()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_head_keeps_the_dashboard_to_itself_and_the_records_on_its_disk(config):
    (command,) = starts(config, "head")
    assert "--dashboard-host=127.0.0.1" in command.split()
    assert "CPLAB_HOME=$HOME/.cplab" in command.split()
    assert "RAY_enable_autoscaler_v2=0" in command.split()
