"""What people schedule a night with: the files parse, run what our own command line knows, repeat nothing, and are what their schemas publish."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from service.cli import app

DEPLOY = Path(__file__).resolve().parents[2] / "service" / "deploy"
SCHEMAS_ENV_VAR = "CPLAB_CRD_SCHEMAS"
"""A folder with KubeRay's published custom resource definitions, `ray.io_rayclusters.yaml` and so on."""
KUBERNETES = "1.31"

MANIFESTS = ("nightly_cronjob.yaml", "kuberay_cluster.yaml", "kuberay_nightly.yaml", "kuberay_nightly_cron.yaml")
UNITS = ("cplab-nightly.service", "cplab-nightly.timer")


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [(name, found) for name in MANIFESTS for found in yaml.safe_load_all((DEPLOY / name).read_text()) if found]


def cron_lines() -> list[tuple[list[str], str]]:
    """(the five fields of the time, user and command) of every line that is no comment and no setting."""
    lines = [line for line in (DEPLOY / "nightly.crontab").read_text().splitlines() if line and not line.startswith("#")]
    jobs = [line.split(maxsplit=6) for line in lines if not re.match(r"[A-Z_]+=", line)]
    return [(job[:5], job[6]) for job in jobs]


def unit_value(name: str, key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.+)$", (DEPLOY / name).read_text(), re.MULTILINE)
    return str(value)


def entry_points() -> Iterator[tuple[str, list[str]]]:
    """(where, command as words) of everything that these files start."""
    for _, command in cron_lines():
        yield "cron", shlex.split(command.replace("$(git rev-parse HEAD)", "REVISION"))
    shell = shlex.split(unit_value("cplab-nightly.service", "ExecStart"))
    yield "systemd", shlex.split(shell[2].replace("$$(git rev-parse HEAD)", "REVISION"))
    by_name = dict(documents())
    (container,) = by_name["nightly_cronjob.yaml"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    yield "CronJob", [*container["command"], *container["args"]]
    yield "RayJob", shlex.split(by_name["kuberay_nightly.yaml"]["spec"]["entrypoint"])
    yield "RayCronJob", shlex.split(by_name["kuberay_nightly_cron.yaml"]["spec"]["jobTemplate"]["entrypoint"])


def test_every_schedule_starts_what_the_command_line_knows() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    started = []
    for where, words in entry_points():
        ours = words[words.index("service") + 1 :] if "service" in words else words[words.index("cplab") + 1 :]
        commands[ours[0]].make_context(ours[0], list(ours[1:]))  # raises where it does not parse
        started.append((where, ours[0]))
        assert "--wait" in ours or ours[0] != "nightly", "somebody's run of that hour fails no night"
        if "submit" in words:
            assert "--no-wait" not in words, "a submission that does not wait never fails"
            assert words[words.index("--") + 1] == "env" and "CPLAB_REVISION=" in " ".join(words), "a job has no .git"
    assert started == [
        ("cron", "nightly"),
        ("cron", "gc"),
        *((w, "nightly") for w in ("systemd", "CronJob", "RayJob", "RayCronJob")),
    ]


@pytest.mark.parametrize("name", ["nightly.crontab", "cplab-nightly.service", *MANIFESTS])
def test_each_says_what_it_needs_and_that_two_starts_are_safe(name: str) -> None:
    text = " ".join((DEPLOY / name).read_text().replace("#", " ").split())
    assert ("It needs" in text and "token" in text) or name == "kuberay_nightly_cron.yaml"
    if name != "kuberay_cluster.yaml":
        assert re.search(r"[Tt]wice|two nights|Two", text), name
    assert ("ALPHA" in text) is (name == "kuberay_nightly_cron.yaml")


def test_nothing_is_repeated_by_its_scheduler_and_two_are_kept_apart() -> None:
    by_name = dict(documents())
    cron = by_name["nightly_cronjob.yaml"]["spec"]
    assert (cron["concurrencyPolicy"], cron["timeZone"]) == ("Forbid", "Etc/UTC")
    assert cron["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert cron["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    for job in (by_name["kuberay_nightly.yaml"]["spec"], by_name["kuberay_nightly_cron.yaml"]["spec"]["jobTemplate"]):
        assert (job["backoffLimit"], job["submitterConfig"]["backoffLimit"], job["shutdownAfterJobFinishes"]) == (0, 0, False)
    assert by_name["kuberay_nightly_cron.yaml"]["spec"]["timeZone"] == "Etc/UTC"
    assert unit_value("cplab-nightly.service", "Type") == "oneshot", "systemd starts no second one beside it"
    assert unit_value("cplab-nightly.timer", "Persistent") == "true"
    assert unit_value("cplab-nightly.timer", "OnCalendar").endswith("UTC")


def test_the_cluster_has_a_fixed_size_a_token_and_a_home_that_outlives_its_head() -> None:
    claim, cluster = (found for name, found in documents() if name == "kuberay_cluster.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is False
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    head = spec["headGroupSpec"]["template"]["spec"]
    (mount,) = head["containers"][0]["volumeMounts"]
    home = next(variable["value"] for variable in head["containers"][0]["env"] if variable["name"] == "CPLAB_HOME")
    assert mount["mountPath"] == home
    assert head["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_jobs_name_the_cluster_and_its_secret() -> None:
    by_name = dict(documents())
    cluster = by_name["kuberay_cluster.yaml"]["metadata"]["name"]
    for job in (by_name["kuberay_nightly.yaml"]["spec"], by_name["kuberay_nightly_cron.yaml"]["spec"]["jobTemplate"]):
        assert job["clusterSelector"] == {"ray.io/cluster": cluster}
    (container,) = by_name["nightly_cronjob.yaml"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    env = {variable["name"]: variable for variable in container["env"]}
    assert env["RAY_ADDRESS"]["value"] == f"http://{cluster}-head-svc:8265", "KubeRay's name for the head's service"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": cluster, "key": "auth_token"}


@pytest.mark.parametrize(("name", "manifest"), documents(), ids=lambda value: value if isinstance(value, str) else value["kind"])
def test_manifests_are_what_their_schemas_publish(name: str, manifest: dict[str, Any]) -> None:
    if not manifest["apiVersion"].startswith("ray.io/"):
        kubernetes_validate = pytest.importorskip(
            "kubernetes_validate", reason="pip install kubernetes-validate: Kubernetes' schemas"
        )
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    folder = os.environ.get(SCHEMAS_ENV_VAR)
    if not folder:
        pytest.skip(f"{SCHEMAS_ENV_VAR} names no folder with KubeRay's custom resource definitions (ray.io_*.yaml)")
    import jsonschema

    assert list(jsonschema.Draft202012Validator(crd_schema(Path(folder), manifest)).iter_errors(manifest)) == []
    wrong = {**manifest, "spec": {**manifest["spec"], "backofLimit": 0}}
    assert not jsonschema.Draft202012Validator(crd_schema(Path(folder), manifest)).is_valid(wrong), "a key that is none is found"


def crd_schema(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The published schema of the manifest's kind and version, strict: the API server would drop a key that it does not know, silently."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = loader((folder / f"ray.io_{manifest['kind'].lower()}s.yaml").read_text()).get_single_data()
    version = manifest["apiVersion"].partition("/")[2]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == version)
    strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return dict(schema)


def strict(schema: Any) -> None:
    if isinstance(schema, list):
        for part in schema:
            strict(part)
    elif isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        for part in schema.values():
            strict(part)


def test_the_units_pass_systemds_own_check(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    for name in UNITS:
        shutil.copy(DEPLOY / name, tmp_path)
    command = ["systemd-analyze", "verify", *(str(tmp_path / name) for name in UNITS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    calendar = ["systemd-analyze", "calendar", unit_value("cplab-nightly.timer", "OnCalendar")]
    assert subprocess.run(calendar, capture_output=True, timeout=60, check=False).returncode == 0


def test_the_cron_lines_are_lines_of_cron() -> None:
    for fields, command in cron_lines():
        assert all(re.fullmatch(r"[\d*/,-]+", field) for field in fields), fields
        assert "%" not in command.replace(r"\%", ""), "cron ends the command at a bare %"
    assert (DEPLOY / "nightly.crontab").read_text().endswith("\n"), "cron does not read a last line without its end"


@pytest.mark.hosts
def test_a_real_cron_runs_the_line(tmp_path: Path) -> None:
    """The file as it is, but for the hour, the user and the folder; `ray` is a script that notes how it was called. Waits for a full minute."""
    cron, unshare = shutil.which("cron", path=f"{os.environ['PATH']}:/usr/sbin"), shutil.which("unshare")
    if cron is None or unshare is None or os.getuid() != 0:
        pytest.skip("needs cron, unshare and root")
    checkout, jobs = tmp_path / "checkout", tmp_path / "cron.d"
    for folder in (checkout / ".venv" / "bin", jobs):
        folder.mkdir(parents=True)
    noted = tmp_path / "noted"
    for name in ("ray", "cplab", "git"):
        script = checkout / ".venv" / "bin" / name
        answer = (
            "echo 0123abc" if name == "git" else f'{{ echo "$PWD $RAY_ADDRESS $RAY_AUTH_MODE"; echo {name} "$@"; }} >> {noted}'
        )
        script.write_text(f"#!/bin/sh\n{answer}\n")
        script.chmod(0o755)
    text = (DEPLOY / "nightly.crontab").read_text().replace("/opt/cplab", str(checkout))
    text, number = re.subn(r"^(\S+ \S+ \S+ \S+ \S+)  cplab  ", "* * * * *  root  ", text, flags=re.MULTILINE)
    assert number == len(cron_lines())
    (jobs / "cplab-nightly").write_text(text)
    # Its own view of the files that it reads and writes: what this machine has scheduled is not started twice.
    mounts = [f"mount --bind {jobs} /etc/cron.d", "mount -t tmpfs tmpfs /run", "mount -t tmpfs tmpfs /var/spool"]
    mounts += ["mount --bind /dev/null /etc/crontab"] if Path("/etc/crontab").exists() else []
    setup = f"{' && '.join(mounts)} && mkdir -p /var/spool/cron/crontabs && exec {cron} -f"
    daemon = subprocess.Popen([unshare, "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", setup])
    try:
        deadline_s = time.monotonic() + 75
        while not (noted.exists() and len(noted.read_text().splitlines()) == 2 * number):
            assert daemon.poll() is None and time.monotonic() < deadline_s, (
                noted.read_text() if noted.exists() else "it ran nothing"
            )
            time.sleep(0.5)
    finally:
        daemon.kill()
        daemon.wait(10)
    lines = noted.read_text().splitlines()
    assert set(lines[::2]) == {f"{checkout} http://127.0.0.1:8265 token"}
    submit = "job submit --working-dir . --runtime-env service/deploy/job.yaml --"
    assert set(lines[1::2]) == {f"ray {submit} env CPLAB_REVISION=0123abc python -m service nightly --wait", "cplab gc"}
