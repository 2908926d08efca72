"""The image, the cluster's manifests and the jobs: valid, of one version, without secrets, and hard to break out of.

What this cannot see is a cluster: KubeRay's schemas and Kubernetes' own stand for it.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tdiff import evaluate, generate, train
from tdiff.config import Config

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT.parent / "shared" / "kuberay"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UID = 10001

FILES = sorted(path for folder in ("cluster", "jobs") for path in (ROOT / folder).rglob("*.yaml"))
KUSTOMIZATIONS = [path for path in FILES if path.name == "kustomization.yaml"]
DOCUMENTS = [
    pytest.param(document, id=f"{path.relative_to(ROOT)}:{document['kind']}/{document['metadata']['name']}")
    for path in FILES
    if path not in KUSTOMIZATIONS
    for document in yaml.safe_load_all(path.read_text())
]
RAY = [param for param in DOCUMENTS if param.values[0]["kind"] in ("RayCluster", "RayJob")]
JOBS = [param for param in RAY if param.values[0]["kind"] == "RayJob"]
every_document = pytest.mark.parametrize("document", DOCUMENTS)
every_job = pytest.mark.parametrize("job", JOBS)


# --- reading manifests -------------------------------------------------------------------------------


def ray_spec(document: dict[str, Any]) -> dict[str, Any] | None:
    """The spec of the Ray cluster that a document describes."""
    spec: dict[str, Any] = document.get("spec", {})
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec")}.get(document["kind"])


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = ray_spec(document)
    if spec is not None:
        groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
        return [group["template"] for group in groups]
    return [document["spec"]["template"]] if document["kind"] == "Deployment" else []


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def all_containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for template in pod_templates(document) for container in containers(template)]


def strict(schema: Any) -> Any:
    """A schema that refuses unknown fields, as the API server's strict field validation does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


@functools.cache
def ray_validator(kind: str) -> Any:
    if not SCHEMAS.is_dir():
        pytest.skip(f"KubeRay's schemas are not there ({SCHEMAS}): {kind} is not checked")
    schema = strict(json.loads((SCHEMAS / f"{kind}-v1.schema.json").read_text()))
    return jsonschema.Draft4Validator(schema)


def validate(document: dict[str, Any]) -> None:
    """Raises if Kubernetes (KubeRay's operator installed) would refuse a document, unknown fields included."""
    for template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    if document["apiVersion"] == "ray.io/v1":
        ray_validator(document["kind"]).validate(document)
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


# --- all manifests -----------------------------------------------------------------------------------


@every_document
def test_valid(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize(
    ("kind", "path", "typo"),
    [
        ("RayJob", ["spec"], "backofLimit"),
        ("RayCluster", ["spec", "headGroupSpec"], "rayStartParam"),
        ("RayCluster", ["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0], "resource"),
        ("Deployment", ["spec", "template", "spec", "containers", 0], "imagePolicy"),
        ("NetworkPolicy", ["spec"], "policyType"),
    ],
)
def test_typos_are_refused(kind: str, path: list[str | int], typo: str) -> None:
    document = copy.deepcopy(next(p.values[0] for p in DOCUMENTS if p.values[0]["kind"] == kind))
    functools.reduce(lambda node, key: node[key], path, document)[typo] = {}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=typo):
        validate(document)


@every_document
def test_containers_are_confined(document: dict[str, Any]) -> None:
    for template in pod_templates(document):
        pod = template["spec"]["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"], pod["fsGroup"]) == (True, UID, UID)
        assert pod["seccompProfile"]["type"] == "RuntimeDefault"
        assert template["spec"]["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert "emptyDir" in mounts["/tmp"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]


@every_document
def test_no_secret_lies_in_a_file(document: dict[str, Any]) -> None:
    assert document["kind"] != "Secret"
    for container in all_containers(document):
        for variable in container.get("env", []):
            if re.search(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", variable["name"]):
                assert "value" not in variable, variable["name"]
                assert variable["valueFrom"]["secretKeyRef"]["name"]


@every_document
def test_one_version_everywhere(document: dict[str, Any]) -> None:
    for container in all_containers(document):
        assert container["image"] == f"{PROJECT['name']}:{PROJECT['version']}"
    spec = ray_spec(document)
    if spec is not None:
        assert f"ARG RAY_VERSION={spec['rayVersion']}\n" in DOCKERFILE
        ray = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray")
        assert Version(spec["rayVersion"]) in ray.specifier


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_kustomization(path: Path) -> None:
    kustomization = yaml.safe_load(path.read_text())
    for resource in kustomization["resources"]:
        target = path.parent / resource
        assert target.is_file() or (target / "kustomization.yaml").is_file(), resource
    if shutil.which("kubectl") is None:
        pytest.skip(f"kubectl is not there: {path.parent} is not rendered")
    rendered = subprocess.run(["kubectl", "kustomize", path.parent], capture_output=True, text=True, check=False)
    assert rendered.returncode == 0, rendered.stderr
    documents = list(yaml.safe_load_all(rendered.stdout))
    for document in documents:
        validate(document)
        test_containers_are_confined(document)
    needs_gpu = any("nvidia.com/gpu" in c["resources"]["limits"] for d in documents for c in all_containers(d))
    assert needs_gpu == ("cpu" not in path.parent.name)


# --- Ray ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", RAY)
def test_ray_clusters(document: dict[str, Any]) -> None:
    spec = ray_spec(document)
    assert spec is not None
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for container in all_containers(document):
        env = {variable["name"]: variable for variable in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "ray-token", "key": "auth_token"}
        assert not {"livenessProbe", "readinessProbe", "command"} & set(container), "KubeRay's own are meant"
    head = all_containers(document)[0]
    timeouts = [v for v in head["env"] if v["name"] == "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]
    assert int(timeouts[0]["value"]) > 60
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    for worker in all_containers(document)[1:]:
        requests, limits = worker["resources"]["requests"], worker["resources"]["limits"]
        assert requests["nvidia.com/gpu"] == limits["nvidia.com/gpu"]


def test_the_copies_of_the_ray_cluster_are_equal() -> None:
    """`kubectl apply -f jobs/train.yaml` wants whole files: nothing but the test keeps the four in step."""
    specs = {param.id: spec for param in DOCUMENTS if (spec := ray_spec(param.values[0])) is not None}
    standing = next(spec for name, spec in specs.items() if "RayCluster" in name)
    for name, spec in specs.items():
        assert spec in (standing, {k: v for k, v in standing.items() if k != "workerGroupSpecs"}), name


@every_job
def test_jobs_retry_and_end(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode"), "the schema takes any string"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"]


def test_network_policy_covers_every_pod() -> None:
    policies = [p.values[0]["spec"] for p in DOCUMENTS if p.values[0]["kind"] == "NetworkPolicy"]
    ray = {"matchLabels": {"ray.io/is-ray-node": "yes"}}  # KubeRay labels its pods so
    closed = [policy for policy in policies if policy["policyTypes"] == ["Ingress"]]
    assert [policy["podSelector"] for policy in closed] == [
        ray,
        {"matchLabels": {"app.kubernetes.io/name": "mlflow"}},
    ]
    for policy in closed:
        for rule in policy["ingress"]:
            # Without `ports` a rule opens all: only for Ray pods. Without a namespace selector: only this namespace.
            assert rule["from"] == [{"podSelector": ray}] or rule["ports"] == [{"port": 8265}]


# --- what runs ---------------------------------------------------------------------------------------


class Reached(Exception):
    """The command has read its arguments; what it would do next is in `args`."""


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise Reached(*arguments)

    monkeypatch.setattr(train, "train", stop)
    monkeypatch.setattr(generate, "existing", stop)
    monkeypatch.setattr(evaluate, "existing", stop)


def arguments_read(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What the job's command makes of its arguments, read by its own parser, in the folder the image runs in."""
    python, dash_m, module, *arguments = shlex.split(job["spec"]["entrypoint"], comments=False)
    assert (python, dash_m) == ("python", "-m"), "one command, no shell: the operator quotes nothing"
    command = {"tdiff.train": train, "tdiff.generate": generate, "tdiff.evaluate": evaluate}[module]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Reached) as stopped:
        command.main()
    return stopped.value.args


@every_job
@pytest.mark.usefixtures("reached")
def test_entrypoint_is_understood(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = arguments_read(job, monkeypatch)[0]
    if job["metadata"]["name"] != "tdiff-train":
        assert first == "/runs/digits"
        return
    assert isinstance(first, Config)
    assert first.name == "digits", "a retry resumes only under a fixed name"
    assert first.runs == "/runs"
    workers = sum(group["replicas"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"])
    assert (first.workers or 2) <= workers, "one GPU each"
    # The server answers only to the names it is told.
    host = (first.tracking or "").removeprefix("http://")
    mlflow = next(p.values[0] for p in DOCUMENTS if p.values[0]["kind"] == "Deployment")
    allowed = next(a for a in all_containers(mlflow)[0]["command"] if a.startswith("--allowed-hosts="))
    assert host in allowed.removeprefix("--allowed-hosts=").split(",")


def test_dockerfile() -> None:
    version = re.search(r"^FROM python:(\d+\.\d+)-slim$", DOCKERFILE, re.M)
    assert version is not None
    assert f">={version[1]}" == PROJECT["requires-python"]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M)[-1] == f"{UID}:{UID}"
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M):
        for source in line.split()[:-1]:
            assert {f"!{source}", f"!{source}/"} & set(ignored), f"{source} is kept from the build"
            assert "*" in source or (ROOT / source).exists()


def test_submit_script(tmp_path: Path) -> None:
    """With a `ray` that only tells how it was called."""
    fake = tmp_path / "ray"
    fake.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    script = ROOT / "jobs" / "submit.sh"
    called = subprocess.run(
        [script, "name=a b"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    folder, *arguments = called.stdout.splitlines()
    assert Path(folder) == ROOT.resolve()
    assert arguments == ["job", "submit", "--working-dir", ".", "--", "python", "-m", "tdiff.train", "name=a b"]
