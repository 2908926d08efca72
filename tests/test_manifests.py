"""The cluster's manifests and the jobs: valid, of one version, without secrets, hard to break out of, and what runs in
them is what the commands understand.

What this cannot see is a cluster: KubeRay's schemas and Kubernetes' own stand for it.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import mlflow
import pytest
import servers
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tdiff import evaluate, generate, train
from tdiff.config import Config

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT.parent / "shared" / "kuberay"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UID = 10001
OURS = f"{PROJECT['name']}:{PROJECT['version']}"

Document = dict[str, Any]

OVERLAYS = sorted(path.parent for path in ROOT.glob("cluster/overlays/*/kustomization.yaml"))
VARIANTS = [overlay.name for overlay in OVERLAYS]
KUSTOMIZATIONS = {
    path.parent: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "cluster").rglob("kustomization.yaml"))
}
FILES = [
    *(folder / file for folder, content in KUSTOMIZATIONS.items() for file in content.get("resources", [])),
    *sorted((ROOT / "jobs").glob("*.yaml")),
]
DOCUMENTS = [
    pytest.param(document, id=f"{path.relative_to(ROOT)}:{document['kind']}/{document['metadata']['name']}")
    for path in FILES
    for document in yaml.safe_load_all(path.read_text())
]
JOBS = [param for param in DOCUMENTS if param.values[0]["kind"] == "RayJob"]
every_document = pytest.mark.parametrize("document", DOCUMENTS)
every_job = pytest.mark.parametrize("job", JOBS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


# --- reading manifests -------------------------------------------------------------------------------


def ray_spec(document: Document) -> dict[str, Any] | None:
    """The spec of the Ray cluster that a document describes."""
    spec: dict[str, Any] = document.get("spec", {})
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec")}.get(document["kind"])


def pod_templates(document: Document) -> list[dict[str, Any]]:
    """Templates of the pods that a document makes; the head's with the autoscaler that KubeRay puts beside it."""
    spec = ray_spec(document)
    if spec is None:
        return [document["spec"]["template"]] if document["kind"] in ("Deployment", "StatefulSet", "Job") else []
    head, *workers = [copy.deepcopy(group["template"]) for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    if spec.get("enableInTreeAutoscaling"):
        main = head["spec"]["containers"][0]
        given = {key: main[key] for key in ("image", "imagePullPolicy")} | {"env": main["env"][:2]}  # the token's
        own = {k: v for k, v in spec["autoscalerOptions"].items() if k not in ("version", "idleTimeoutSeconds")}
        head["spec"]["containers"].append({"name": "autoscaler", **given, **own})
    return [head, *workers]


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def all_containers(document: Document) -> list[dict[str, Any]]:
    return [container for template in pod_templates(document) for container in containers(template)]


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) in a document, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from walk(value)
    elif isinstance(node, list):
        for item in node:
            yield from walk(item)


@functools.cache
def build(folder: Path) -> list[Document]:
    if shutil.which("kubectl") is None:
        pytest.skip(f"kubectl is not there: {folder} is not built")
    built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


@functools.cache
def write() -> Any:
    """jobs/write.py as a module."""
    spec = importlib.util.spec_from_file_location("write", ROOT / "jobs/write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def jobs_on(overlay: Path) -> list[Document]:
    """The jobs as jobs/write.py makes them with an overlay's Ray cluster."""
    build(overlay)  # skips where it cannot
    return [yaml.safe_load(text) for text in write().files(overlay).values()]


def named(documents: list[Document], kind: str, name: str) -> Document:
    return next(d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name))


# --- each document -----------------------------------------------------------------------------------


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


WORDS = {
    "accessModes": {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "operator": {"In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt", "Equal"},
    "policyTypes": {"Ingress", "Egress"},
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "upscalingMode": {"Default", "Aggressive", "Conservative"},
}
"""Words that the schemas take for any text, and the servers do not."""

QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGT]|[KMGT]i)?")


def check_valid(document: Document) -> None:
    """Raises if Kubernetes (KubeRay's operator installed) would refuse a document, unknown fields included."""
    latest = kubernetes_validate.latest_version()
    for template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, latest, strict=True)
    if document["apiVersion"] == "ray.io/v1":
        ray_validator(document["kind"]).validate(document)
    else:
        kubernetes_validate.validate(document, latest, strict=True)
    for key, value in walk(document):
        if key in WORDS:
            assert set(value if isinstance(value, list) else [value]) <= WORDS[key], f"{key}: {value}"
        if key in ("requests", "limits") and isinstance(value, dict):
            for quantity in value.values():
                assert QUANTITY.fullmatch(str(quantity)), quantity


def check_confined(document: Document) -> None:
    for template in pod_templates(document):
        pod = template["spec"]["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"], pod["fsGroup"]) == (True, UID, UID)
        assert pod["seccompProfile"]["type"] == "RuntimeDefault"
        assert template["spec"]["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(template["spec"])
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        claims = {claim["metadata"]["name"]: claim for claim in document["spec"].get("volumeClaimTemplates", [])}
        assert not [volume for volume in volumes.values() if "hostPath" in volume]
        assert all(volume["emptyDir"]["sizeLimit"] for volume in volumes.values() if "emptyDir" in volume)
        for container in containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            mounts = {m["mountPath"]: (volumes | claims)[m["name"]] for m in container["volumeMounts"]}
            assert "emptyDir" in mounts["/tmp"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            # The one account is the autoscaler's, which users' code does not share a container with.
            account = [mount for mount, volume in mounts.items() if "projected" in volume]
            assert account == (
                ["/var/run/secrets/kubernetes.io/serviceaccount"] if container["name"] == "autoscaler" else []
            )


def gib(quantity: str) -> float:
    """Of a size such as 24Gi."""
    return int(quantity[:-2]) * {"Mi": 2**-10, "Gi": 1}[quantity[-2:]]


def check_disk(document: Document) -> None:
    """Ray's pods are placed by the disk they may fill, and may fill all their folders that count as the node's."""
    for template in pod_templates(document) if ray_spec(document) else []:
        resources = [container["resources"] for container in containers(template)]
        for one in resources:
            assert 0 < gib(one["requests"]["ephemeral-storage"]) <= gib(one["limits"]["ephemeral-storage"])
        folders = sum(gib(v["emptyDir"]["sizeLimit"]) for v in template["spec"]["volumes"] if "emptyDir" in v)
        assert folders >= 20
        assert sum(gib(one["limits"]["ephemeral-storage"]) for one in resources) > folders + 3, "logs count too"


def check_which_secrets_may_be_missing(document: Document) -> None:
    """The object store's keys, where pods have an identity of their own; but not those of the store in the cluster."""
    for container in all_containers(document):
        for variable in container.get("env", []):
            if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                own = document["kind"] == "StatefulSet"
                assert secret.get("optional", False) == (secret["name"] == "s3" and not own), variable["name"]


def check_no_secret_lies_in_a_file(document: Document) -> None:
    assert document["kind"] != "Secret"
    for container in all_containers(document):
        for variable in container.get("env", []):
            if re.search(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", variable["name"]):
                assert "value" not in variable, variable["name"]
                assert variable["valueFrom"]["secretKeyRef"]["name"]
    for key, value in walk(document):
        assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), f"{key} holds a password"


def check_one_version(document: Document) -> None:
    for container in all_containers(document):
        image = container["image"]
        assert image == OURS or re.fullmatch(r"(postgres|chrislusf/seaweedfs):\d+\.\d+", image), image
    spec = ray_spec(document)
    if spec is not None:
        assert f"ARG RAY_VERSION={spec['rayVersion']}\n" in DOCKERFILE
        ray = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray")
        assert Version(spec["rayVersion"]) in ray.specifier


def check_ray(document: Document) -> None:
    spec = ray_spec(document)
    if spec is None:
        return
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for template in pod_templates(document):
        main = template["spec"]["containers"][0]
        env = {variable["name"]: variable for variable in main["env"]}
        drained = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]["value"])
        assert drained + 20 < template["spec"]["terminationGracePeriodSeconds"], "Ray ends before it is killed"
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "ray-token", "key": "auth_token"}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(env)
        annotations = template["metadata"]["annotations"]
        assert annotations["karpenter.sh/do-not-disrupt"] == "true"
        assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        assert not {"livenessProbe", "readinessProbe", "command"} & set(main), "KubeRay's own are meant"
    # The autoscaler gets the token from the operator: given twice, the list would hold it twice.
    assert "env" not in spec["autoscalerOptions"]
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    timeouts = [v for v in head["env"] if v["name"] == "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]
    assert int(timeouts[0]["value"]) > 60
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    affinity = spec["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    avoided = {(e["key"], value) for e in term["matchExpressions"] for value in e["values"] if e["operator"] == "NotIn"}
    spot = {("karpenter.sh/capacity-type", "spot"), ("eks.amazonaws.com/capacityType", "SPOT")}
    assert spot | {("cloud.google.com/gke-spot", "true")} <= avoided
    for group in spec["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], "a job counts what is there"
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"].get("nvidia.com/gpu") == resources["limits"].get("nvidia.com/gpu")


def check_not_exposed(document: Document) -> None:
    assert document["kind"] != "Ingress"
    assert document["spec"].get("type", "ClusterIP") == "ClusterIP" if document["kind"] == "Service" else True
    for key, value in walk(document):
        assert key not in ("enableIngress", "hostPort", "nodePort")
        assert key != "serviceType" or value == "ClusterIP"


def check_probes(document: Document) -> None:
    for container in [] if ray_spec(document) else all_containers(document):
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        ports = {port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert "exec" in container[probe] or container[probe]["httpGet"]["port"] in ports


def check_job(document: Document) -> None:
    if document["kind"] != "RayJob":
        return
    spec = document["spec"]
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 600, "its GPUs idle meanwhile"
    assert spec["backoffLimit"] > 0
    assert "clusterSelector" not in spec, "KubeRay refuses backoffLimit beside it"
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert len(document["metadata"]["name"]) <= 47


CHECKS: list[Callable[[Document], None]] = [
    check_valid, check_confined, check_disk, check_no_secret_lies_in_a_file, check_which_secrets_may_be_missing,
    check_one_version, check_ray, check_not_exposed, check_probes, check_job,
]  # fmt: skip


@every_document
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_document(document: Document, check: Callable[[Document], None]) -> None:
    check(document)


@pytest.mark.parametrize(
    ("kind", "path", "typo"),
    [
        ("RayJob", ["spec"], "backofLimit"),
        ("RayCluster", ["spec", "headGroupSpec"], "rayStartParam"),
        ("RayCluster", ["spec", "autoscalerOptions"], "idleTimeout"),
        ("RayCluster", ["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0], "resource"),
        ("Deployment", ["spec", "template", "spec", "containers", 0], "imagePolicy"),
        ("StatefulSet", ["spec", "volumeClaimTemplates", 0, "spec"], "accessMode"),
        ("NetworkPolicy", ["spec"], "policyType"),
        ("ConfigMap", [], "date"),
    ],
)
def test_typos_are_refused(kind: str, path: list[str | int], typo: str) -> None:
    document = copy.deepcopy(next(p.values[0] for p in DOCUMENTS if p.values[0]["kind"] == kind))
    functools.reduce(lambda node, key: node[key], path, document)[typo] = {}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=typo):
        check_valid(document)


@pytest.mark.parametrize(
    ("kind", "path", "word"),
    [
        ("RayJob", ["spec", "submissionMode"], "HttpMode"),
        ("PersistentVolumeClaim", ["spec", "accessModes"], ["ReadWriteAll"]),
        ("RayCluster", ["spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePullPolicy"], "IfAbsent"),
        ("Deployment", ["spec", "template", "spec", "containers", 0, "resources", "limits", "memory"], "2GB"),
    ],
)
def test_wrong_words_are_refused(kind: str, path: list[str | int], word: object) -> None:
    document = copy.deepcopy(next(p.values[0] for p in DOCUMENTS if p.values[0]["kind"] == kind))
    functools.reduce(lambda node, key: node[key], path[:-1], document)[path[-1]] = word
    with pytest.raises(AssertionError):
        check_valid(document)


# --- what the image installs -------------------------------------------------------------------------


LOCK = (ROOT / "requirements.lock").read_text()


def locked() -> dict[str, Version]:
    """Every package of the lock, each with one version."""
    found = [re.fullmatch(r"([a-z0-9-]+)==(\S+)", line) for line in LOCK.splitlines()]
    assert all(found), "no URL, host, option or comment: names and versions only"
    versions = {match[1]: Version(match[2]) for match in found if match is not None}
    assert len(versions) == len(found)
    return versions


def test_the_lock_is_what_the_project_asks_for() -> None:
    versions = locked()
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cluster"]]:
        requirement = Requirement(text)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, f"{text}: run `make lock`"
        for extra in requirement.extras:  # what ray[train,default] adds: not one of them may be missing
            for added in map(Requirement, importlib.metadata.requires(requirement.name) or ()):
                if added.marker is not None and added.marker.evaluate({"extra": extra}):
                    assert canonicalize_name(added.name) in versions, f"{added} of {text}: run `make lock`"


def test_the_lock_has_the_manifests_ray() -> None:
    (ray,) = {spec["rayVersion"] for p in DOCUMENTS if (spec := ray_spec(p.values[0]))}
    assert str(locked()["ray"]) == ray
    assert f"ARG RAY_VERSION={ray}\n" in DOCKERFILE


def test_the_image_installs_the_lock() -> None:
    installed = re.findall(r"^RUN uv pip install ((?:.*\\\n)*.*)$", DOCKERFILE, re.M)
    assert ["requirements.lock" in command for command in installed] == [True, True, False]
    assert "--no-deps" in installed[-1], "tdiff itself brings nothing more"
    assert re.search(r"pip install --no-cache-dir uv==\d+\.\d+\.\d+$", DOCKERFILE, re.M)


# --- what kustomize builds of them -------------------------------------------------------------------


# What kustomize 2.0.3 (in Debian's kubectl 1.20) takes, and version 5 still does, though it warns.
KNOWN = {
    "apiVersion", "kind", "namespace", "namePrefix", "nameSuffix", "commonLabels", "commonAnnotations", "resources",
    "bases", "patchesStrategicMerge", "patchesJson6902", "configMapGenerator", "generatorOptions", "vars", "images",
}  # fmt: skip


def check_known(kustomization: dict[str, Any], folder: Path) -> None:
    """Raises if kustomize 2.0.3 would refuse a kustomization, or read another thing than newer ones."""
    assert set(kustomization) <= KNOWN
    patches = kustomization.get("patchesJson6902", [])
    files = [*kustomization.get("resources", []), *kustomization.get("patchesStrategicMerge", [])]
    for patch in patches:
        assert set(patch) == {"target", "path"}, "no patch in line"
        assert {"version", "kind", "name"} <= set(patch["target"]) <= {"group", "version", "kind", "name", "namespace"}
    for file in [*files, *(patch["path"] for patch in patches)]:
        assert (folder / file).is_file(), f"{file}: a folder is one of the bases"
        assert (folder / file).resolve().is_relative_to(folder.resolve()), f"{file}: not in the folder or below"
        assert "$patch" not in (folder / file).read_text(), f"{file}: what is deleted leaves an empty document"
    for base in kustomization.get("bases", []):
        assert (folder / base / "kustomization.yaml").is_file(), base
    for image in kustomization.get("images", []):
        assert set(image) <= {"name", "newName", "newTag", "digest"}


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_an_old_kustomize_knows_all_of_it(folder: Path) -> None:
    kustomization = KUSTOMIZATIONS[folder]
    check_known(kustomization, folder)
    taken = [*kustomization.get("resources", []), *kustomization.get("patchesStrategicMerge", [])]
    taken += [patch["path"] for patch in kustomization.get("patchesJson6902", [])]
    assert {path.name for path in folder.glob("*.yaml")} == {"kustomization.yaml", *taken}, "a file that counts nowhere"


@pytest.mark.parametrize(
    "newer",
    [
        {"components": ["../../s3-store"]},
        {"replacements": []},
        {"patches": [{"path": "runs.yaml"}]},
        {"resources": ["../../base"]},
        {"bases": ["runs.yaml"]},
        {"patchesStrategicMerge": ["$patch: delete"]},
        {"patchesStrategicMerge": ["../cpu-trial/runs.yaml"]},
        {"patchesStrategicMerge": ["deleting.yaml"]},
        {"patchesJson6902": [{"target": {"version": "v1", "kind": "RayCluster", "name": "tdiff"}, "patch": "[]"}]},
        {"patchesJson6902": [{"target": {"kind": "RayCluster"}, "path": "list.yaml"}]},
    ],
    ids=lambda newer: next(iter(newer)),
)
def test_what_an_old_kustomize_does_not_know_is_refused(newer: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "cluster", tmp_path / "cluster")) / "overlays/gpu-node"
    (folder / "list.yaml").write_text("[]")
    (folder / "deleting.yaml").write_text((folder / "runs.yaml").read_text() + "$patch: delete\n")
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    target = {"group": "ray.io", "version": "v1", "kind": "RayCluster", "name": "tdiff"}
    check_known(kustomization | {"patchesJson6902": [{"target": target, "path": "list.yaml"}]}, folder)
    with pytest.raises(AssertionError):
        check_known(kustomization | newer, folder)


@every_variant
@pytest.mark.parametrize("what", ["cluster", "jobs"])
def test_build(variant: str, what: str) -> None:
    overlay = ROOT / "cluster/overlays" / variant
    documents = build(overlay) if what == "cluster" else jobs_on(overlay)
    for document in documents:
        for check in CHECKS:
            check(document)
        assert document["metadata"].get("namespace", document["metadata"]["name"]) == "tdiff"
    ray = [spec for spec in map(ray_spec, documents) if spec is not None]
    assert ray
    for spec in ray:
        limits = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in spec["workerGroupSpecs"]]
        assert all(("nvidia.com/gpu" in limit) == ("gpu" in variant) for limit in limits)
        assert all(group["maxReplicas"] == 1 for group in spec["workerGroupSpecs"]) == (variant == "gpu-node")


@every_variant
def test_jobs_run_on_what_the_overlay_describes(variant: str) -> None:
    overlay = ROOT / "cluster/overlays" / variant
    standing = ray_spec(named(build(overlay), "RayCluster", "tdiff"))
    jobs = jobs_on(overlay)
    assert {job["kind"] for job in jobs} == {"RayJob"}
    assert all(job["spec"]["rayClusterSpec"] == standing for job in jobs)


def test_the_jobs_files_are_what_is_built() -> None:
    build(write().OVERLAY)  # skips where it cannot
    there = {path.name: path.read_text() for path in (ROOT / "jobs").glob("*.yaml")}
    assert there == write().files(write().OVERLAY), "run `make manifests`"
    assert {name.removesuffix(".yaml") for name in there} == {
        "train", "tree", "diffusion", "samples", "report", "generate", "evaluate",
    }  # fmt: skip


def test_writing_jobs(tmp_path: Path) -> None:
    """As jobs/README.md has it, from another folder; without a Ray cluster, or a folder to write to, it says so."""
    build(ROOT / "cluster/overlays/gpu-node")  # skips where it cannot
    command = [sys.executable, ROOT / "jobs/write.py"]
    subprocess.run([*command, "cluster/overlays/gpu-node", tmp_path / "jobs"], cwd=ROOT, check=True, timeout=60)
    texts = {path.name: path.read_text() for path in (tmp_path / "jobs").iterdir()}
    assert texts == write().files(ROOT / "cluster/overlays/gpu-node")
    for arguments, said in (
        ([ROOT / "cluster/base", tmp_path / "none"], "has no RayCluster"),
        ([tmp_path, tmp_path / "none"], "does not build"),
        ([ROOT / "cluster/overlays/gpu-node"], "name the folder"),
    ):
        refused = subprocess.run([*command, *arguments], check=False, timeout=60, capture_output=True, text=True)
        assert refused.returncode != 0
        assert said in refused.stderr
    assert not (tmp_path / "none").exists()


SECRETS = {"ray-token": {"auth_token"}, "postgres": {"password"}, "s3": {"access-key-id", "secret-access-key"}}


@every_variant
def test_what_is_referred_to_is_there(variant: str) -> None:
    overlay = build(ROOT / "cluster/overlays" / variant)
    maps = {d["metadata"]["name"] for d in overlay if d["kind"] == "ConfigMap"} | {"kube-root-ca.crt"}
    claims = {d["metadata"]["name"] for d in overlay if d["kind"] == "PersistentVolumeClaim"}
    services = {d["metadata"]["name"]: d["spec"]["ports"][0]["port"] for d in overlay if d["kind"] == "Service"}
    readme = (ROOT / "cluster/README.md").read_text()
    for name, keys in SECRETS.items():
        assert f"create secret generic {name} " in readme
        assert all(f"--from-literal={key}=" in readme for key in keys)
    addresses = set()
    for key, value in walk([*overlay, *jobs_on(ROOT / "cluster/overlays" / variant)]):
        if key == "secretKeyRef":
            assert value["key"] in SECRETS[value["name"]]
        elif key in ("configMapRef", "configMapKeyRef", "configMap"):
            assert value["name"] in maps
        elif key == "claimName":
            assert value in claims
        elif isinstance(value, str):
            addresses |= set(re.findall(r"(?:https?://|://\w+@)(\w+):(\d+)", value))
    assert {"mlflow", "postgres"} <= {name for name, _ in addresses}
    assert {(name, str(port)) for name, port in services.items()} == addresses, "a Service for each, and for none else"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The folder cluster/, to be changed."""
    return Path(shutil.copytree(ROOT / "cluster", tmp_path / "tree" / "cluster"))


@every_variant
def test_runs_need_no_volume_where_they_lie_on_s3(variant: str, copied: Path) -> None:
    """In cluster/overlays/gpu-pool-s3, and in a copy of it for other nodes."""
    folder = copied / "overlays/gpu-pool-s3"
    if variant != folder.name:
        bases = KUSTOMIZATIONS[ROOT / "cluster/overlays" / variant]["bases"]
        bases = [base for base in bases if base != "../../runs-volume"]
        path = folder / "kustomization.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"bases": bases}))
    documents = [*build(folder), *jobs_on(folder)]
    assert not [value for key, value in walk(documents) if key in ("claimName", "mountPath") and "runs" in value]
    assert not [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
    for document in documents:
        for check in CHECKS:
            check(document)


def test_an_overlay_of_ones_own(copied: Path) -> None:
    """The commands of cluster/README.md, as they stand there; what they make builds, and changes what it says."""
    readme = (ROOT / "cluster/README.md").read_text()
    (commands,) = re.findall(r"\n( +mkdir cluster/overlays/mine\n.*?)\n\n(?! {7})", readme, re.DOTALL)
    subprocess.run(["bash", "-euc", textwrap.dedent(commands)], cwd=copied.parent, check=True, timeout=60)
    mine = copied / "overlays/mine"
    check_known(yaml.safe_load((mine / "kustomization.yaml").read_text()), mine)
    documents = build(mine)
    assert named(documents, "ConfigMap", "s3")["data"]["AWS_REGION"] == "eu-central-1"
    assert named(documents, "ConfigMap", "s3")["data"]["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"
    assert named(documents, "ConfigMap", "mlflow")["data"]["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://BUCKET/mlflow"
    ours = [
        container["image"]
        for document in [*documents, *jobs_on(mine)]
        for container in all_containers(document)
        if "postgres" not in container["image"]
    ]
    assert set(ours) == {"REGISTRY/tdiff@sha256:…"}
    assert len(ours) > len(jobs_on(mine))


def labels_of(template: dict[str, Any], document: Document) -> dict[str, str]:
    """Labels of a template's pods; KubeRay labels its own."""
    return {"ray.io/is-ray-node": "yes"} if ray_spec(document) else template["metadata"]["labels"]


WHO = {
    "ray": {"ray.io/is-ray-node": "yes"},
    "mlflow": {"app.kubernetes.io/name": "mlflow"},
    "postgres": {"app.kubernetes.io/name": "postgres"},
    "s3": {"app.kubernetes.io/name": "s3"},
    "operator": {"app.kubernetes.io/component": "kuberay-operator"},
}
MAY_REACH = {
    "ray": {("ray", "every port"), ("operator", 8265)},
    "mlflow": {("ray", 5000)},
    "postgres": {("mlflow", 5432)},
    "s3": {("ray", 8333), ("mlflow", 8333)},
}


OUTWARD = {
    "podSelector": {},
    "policyTypes": ["Egress"],
    "egress": [
        {"to": [{"podSelector": {}}]},
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
        {
            "to": [
                {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}},
                {"ipBlock": {"cidr": "::/0", "except": ["fe80::/10", "fd00:ec2::/32"]}},
            ]
        },
    ],
}
"""What every pod may reach: all but the services at which a cloud's nodes get their own credentials."""


@every_variant
def test_who_may_talk_to_whom(variant: str) -> None:
    documents = build(ROOT / "cluster/overlays" / variant)
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    outward = [policy for policy in policies if "Egress" in policy["policyTypes"] or "egress" in policy]
    assert outward == [OUTWARD], "policies add up: another one would open more"
    for block in (value for key, value in walk(OUTWARD) if key == "ipBlock"):
        world = ipaddress.ip_network(block["cidr"])
        assert all(ipaddress.ip_network(part).subnet_of(world) for part in block["except"]), "else it is refused"
    policies.remove(OUTWARD)
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies, "closed, but for what the others open"
    names = {json.dumps(labels): name for name, labels in WHO.items()}
    reach: dict[str, set[tuple[str, object]]] = {}
    for policy in policies:
        for rule in policy.get("ingress", []):
            to = names[json.dumps(policy["podSelector"]["matchLabels"])]
            for peer in rule["from"]:
                source = names[json.dumps(peer["podSelector"]["matchLabels"])]
                # Without a namespace selector a peer is of this namespace.
                assert ("namespaceSelector" in peer) == (source == "operator")
                ports = [port["port"] for port in rule.get("ports", [])] or ["every port"]
                reach.setdefault(to, set()).update((source, port) for port in ports)
    pods = [labels_of(t, d) for d in documents for t in pod_templates(d)]
    there = {names[json.dumps({k: v})] for labels in pods for k, v in labels.items() if json.dumps({k: v}) in names}
    assert reach == {name: MAY_REACH[name] for name in there}
    for service in (d for d in documents if d["kind"] == "Service"):
        to = names[json.dumps(service["spec"]["selector"])]
        assert {port["port"] for port in service["spec"]["ports"]} == {port for _, port in reach[to]}


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


def arguments_read(entrypoint: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What a job's command makes of its arguments, read by its own parser, in the folder the image runs in."""
    python, dash_m, module, *arguments = shlex.split(entrypoint, comments=False)
    assert (python, dash_m) == ("python", "-m"), "one command, no shell: the operator quotes nothing"
    command = {"tdiff.train": train, "tdiff.generate": generate, "tdiff.evaluate": evaluate}[module]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Reached) as stopped:
        command.main()
    return stopped.value.args


@every_job
@pytest.mark.parametrize("root", ["/runs", "s3://tdiff/runs"])
@pytest.mark.usefixtures("reached")
def test_entrypoint_is_understood(job: Document, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, entrypoint = job["metadata"]["name"].removeprefix("tdiff-"), job["spec"]["entrypoint"]
    if root != "/runs":  # as jobs/README.md says
        line = next(line for line in (ROOT / f"jobs/{name}.yaml").read_text().splitlines() if "entrypoint:" in line)
        assert line == f"  entrypoint: {entrypoint}", "in one line, for sed"
        entrypoint = entrypoint.replace("/runs", root, 1)
    assert job["metadata"]["labels"] == {"tdiff/job": name}
    first, *rest = arguments_read(entrypoint, monkeypatch)
    if name in ("generate", "evaluate"):
        assert first == f"{root}/digits"
        return
    assert isinstance(first, Config)
    assert (first.name, first.runs) == ("digits", root), "a retry resumes only under a fixed name"
    assert rest[0] == (None if name == "train" else name)
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (first.workers or 2) <= sum(group["minReplicas"] for group in groups), "one GPU each"
    # The server answers only to the names it is told.
    host = (first.tracking or "").removeprefix("http://")
    server = next(p.values[0] for p in DOCUMENTS if p.values[0]["kind"] == "Deployment")
    allowed = next(a for a in all_containers(server)[0]["command"] if a.startswith("--allowed-hosts="))
    assert host in allowed.removeprefix("--allowed-hosts=").split(",")


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
    environment = arguments.pop(arguments.index("--runtime-env-json") + 1)
    assert list(json.loads(environment)["env_vars"]) == ["TDIFF_COMMIT"]
    options = ["--working-dir", ".", "--runtime-env-json"]
    assert arguments == ["job", "submit", *options, "--", "python", "-m", "tdiff.train", "name=a b"]


CLIENTS = {
    "s3fs": "import s3fs; fs = s3fs.S3FileSystem(); fs.pipe_file('tdiff/s3fs', b'1'); fs.cat_file('tdiff/s3fs')",
    "boto3": "import boto3; boto3.client('s3').put_object(Bucket='tdiff', Key='boto3', Body=b'1')",
}


@pytest.mark.parametrize("client", CLIENTS)
def test_the_s3_variables_lead_every_client(client: str, no_aws: None, moto_server: servers.Server) -> None:
    """By a host name and with the bucket in the path: in a cluster there is no name bucket.s3."""
    variables = dict(named(build(ROOT / "cluster/overlays/gpu-node"), "ConfigMap", "s3")["data"])
    assert variables["AWS_ENDPOINT_URL_S3"] == "http://s3:8333"
    variables["AWS_ENDPOINT_URL_S3"] = f"http://localhost:{moto_server.port}"
    if client == "s3fs":  # once
        moto_server.make_bucket("tdiff")
    keys = {"AWS_ACCESS_KEY_ID": servers.KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET}
    before = len(moto_server.log.read_text())
    command = [sys.executable, "-c", CLIENTS[client]]
    done = subprocess.run(
        command, env=os.environ | variables | keys, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f'"PUT /tdiff/{client}' in moto_server.log.read_text()[before:]


# --- slow: programs of others ------------------------------------------------------------------------


@pytest.fixture
def postgres() -> Iterator[int]:
    """A PostgreSQL server with the user and database of cluster/base/postgres.yaml; its port."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not there (Debian's package postgresql)")
    # It refuses to run as root, and its folder must be its user's.
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="tdiff-postgres-") as name:
        folder, port = Path(name), servers.free_port()
        (folder / "password").write_text("of-a-test")
        if user:
            shutil.chown(folder, user)
            shutil.chown(folder / "password", user)
        initdb = [programs[-1], "-D", folder / "data", "-U", "mlflow", "--auth=scram-sha-256", "--no-sync"]
        subprocess.run(
            [*initdb, f"--pwfile={folder}/password"],
            user=user,
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=120,
        )
        options = ["-D", folder / "data", "-k", folder, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
        server = subprocess.Popen(
            [programs[-1].with_name("postgres"), *options], user=user, cwd=folder, stderr=subprocess.DEVNULL
        )
        try:
            until(lambda: query(port, "CREATE DATABASE mlflow", "postgres"), server)
            yield port
        finally:
            server.terminate()
            server.wait(60)


def query(port: int, sql: str, database: str = "mlflow") -> list[Any]:
    import psycopg2

    connection = psycopg2.connect(
        host="127.0.0.1", port=port, user="mlflow", password="of-a-test", dbname=database, connect_timeout=5
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def until(act: Callable[[], Any], server: subprocess.Popen[Any], seconds: float = 120) -> Any:
    """What `act` returns once it raises no more."""
    deadline = time.monotonic() + seconds
    while True:
        assert server.poll() is None, "the server ended"
        try:
            return act()
        except Exception:  # of whichever client: raised below, when time is up
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def status(url: str, host: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_mlflow_on_postgresql_and_s3(
    postgres: int, moto_server: servers.Server, no_aws: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command and variables of cluster/base/mlflow.yaml, but for addresses and secrets."""
    documents = build(ROOT / "cluster/overlays/gpu-node")
    (container,) = all_containers(named(documents, "Deployment", "mlflow"))
    port = servers.free_port()
    variables: dict[str, str] = {}
    for source in container["envFrom"]:
        variables |= named(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    secrets = {"PGPASSWORD": "of-a-test", "AWS_ACCESS_KEY_ID": servers.KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET}
    for variable in container["env"]:
        variables[variable["name"]] = variable["value"] if "value" in variable else secrets[variable["name"]]
    uri = variables["MLFLOW_BACKEND_STORE_URI"]
    variables["MLFLOW_BACKEND_STORE_URI"] = uri.replace("@postgres:5432", f"@127.0.0.1:{postgres}")
    variables["AWS_ENDPOINT_URL_S3"] = variables["AWS_ENDPOINT_URL_S3"].replace(
        "s3:8333", f"localhost:{moto_server.port}"
    )
    bucket, _, folder = variables["MLFLOW_ARTIFACTS_DESTINATION"].removeprefix("s3://").partition("/")
    moto_server.make_bucket(bucket)
    command = [argument.replace("5000", str(port)) for argument in container["command"]]
    command[0] = servers.program(command[0])
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | variables, cwd=tmp_path, stdout=log, stderr=log)
    try:
        address = f"http://localhost:{port}"
        until(lambda: urllib.request.urlopen(f"{address}/health", timeout=5), server)
        assert status(f"{address}/health", "10.1.2.3:5000") == 200, "the kubelet's probe, by the pod's address"
        assert status(f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0", f"mlflow:{port}") == 200
        assert status(f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0", "elsewhere:5000") == 403
        client = mlflow.MlflowClient(tracking_uri=address)
        run = client.create_run(client.create_experiment("digits")).info
        client.log_metric(run.run_id, "loss", 0.5)
        (tmp_path / "picture.txt").write_text("a picture")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client.log_artifact(run.run_id, str(tmp_path / "picture.txt"))
        assert query(postgres, f"SELECT value FROM metrics WHERE run_uuid = '{run.run_id}'") == [(0.5,)]
        assert f'"PUT /{bucket}/{folder}/' in moto_server.log.read_text()
        (tmp_path / "read").mkdir()
        read = client.download_artifacts(run.run_id, "picture.txt", str(tmp_path / "read"))
        assert Path(read).read_text() == "a picture"
    except BaseException:
        print((tmp_path / "log").read_text()[-3000:])
        raise
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def checkov() -> Iterator[Path]:
    """Installed in an environment of its own: its pins and those of boto3 here do not go together."""
    with tempfile.TemporaryDirectory(prefix="tdiff-checkov-") as folder:
        uv = servers.program("uv")
        made = subprocess.run([uv, "venv", "--quiet", folder + "/venv"], check=False, timeout=60)
        python = f"{folder}/venv/bin/python"
        installing = [uv, "pip", "install", "--quiet", "--python", python, "checkov>=3.2,<4"]
        if made.returncode or subprocess.run(installing, check=False, timeout=500).returncode:
            pytest.skip("checkov cannot be installed")
        yield Path(folder) / "venv/bin/checkov"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkov_finds_nothing(checkov: Path, tmp_path: Path) -> None:
    """In all that is built and in the Dockerfile; what is skipped says why beside the resource, and is needed there."""
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    annotated = set()
    for variant in VARIANTS:
        overlay, out = ROOT / "cluster/overlays" / variant, []
        for document in [*build(overlay), *jobs_on(overlay)]:
            spec = ray_spec(document)
            if spec is None:
                out.append(document)
                continue
            # checkov knows no RayCluster, but the pods that KubeRay makes of it.
            for index, template in enumerate(pod_templates(document)):
                labels = labels_of(template, document)
                metadata = {"name": f"{document['metadata']['name']}-{index}", "namespace": "tdiff", "labels": labels}
                metadata |= template["metadata"]
                out.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
        for document in out:
            for key, text in document["metadata"].get("annotations", {}).items():
                if not key.startswith("checkov.io/"):
                    continue
                assert re.fullmatch(r"CKV2?_K8S_\d+=.{20,}", text), key
                annotated.add((document["kind"], document["metadata"]["name"], text.partition("=")[0]))
        (tmp_path / f"{variant}.yaml").write_text(yaml.safe_dump_all(out))
    done = subprocess.run(
        [checkov, "-d", tmp_path, "--framework", "kubernetes", "dockerfile", "--skip-download", "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    reports = {report["check_type"]: report for report in json.loads(done.stdout)}
    assert set(reports) == {"kubernetes", "dockerfile"}
    for report in reports.values():
        failed = [(c["check_id"], c["resource"], c["check_name"]) for c in report["results"]["failed_checks"]]
        assert failed == []
        assert report["summary"]["parsing_errors"] == 0
        assert report["summary"]["passed"] > 20
    assert done.returncode == 0
