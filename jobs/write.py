"""python jobs/write.py [OVERLAY FOLDER]: writes train.yaml and the other jobs into FOLDER, each with the Ray cluster of
OVERLAY, a folder that `kubectl kustomize` builds.

Without arguments: from cluster/overlays/gpu-pool, into jobs/. `make manifests` runs that after a change in jobs/source
or cluster/ray/gpu-pool; a test tells when it was forgotten.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

JOBS = Path(__file__).parent
OVERLAY = JOBS.parent / "cluster" / "overlays" / "gpu-pool"
HEADER = """\
# Written by jobs/write.py from jobs/source and the RayCluster of {overlay}: change those, not this file.
#   kubectl apply -f {job}.yaml && kubectl -n tdiff get rayjob {name} --watch
# Another run: change name=… in a copy of your own, and `kubectl replace --force -f` it.
"""


def cluster_of(overlay: Path) -> dict[str, Any]:
    """The RayCluster among the documents of a kustomize folder. Ends the program if it does not build or has none."""
    built = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    if built.returncode:
        sys.exit(f"{overlay} does not build: {built.stderr}")
    for document in yaml.safe_load_all(built.stdout):
        if document["kind"] == "RayCluster":
            return dict(document)
    sys.exit(f"{overlay} has no RayCluster: name a folder that has one, such as cluster/ray/gpu-pool")


def files(overlay: Path) -> dict[str, str]:
    """File name -> text of each job, on the Ray cluster that an overlay describes."""
    cluster = cluster_of(overlay)
    common = yaml.safe_load((JOBS / "source" / "common.yaml").read_text())
    out = {}
    for job in yaml.safe_load_all((JOBS / "source" / "jobs.yaml").read_text()):
        # What is read first stands first, and the cluster last.
        entrypoint = job["spec"].pop("entrypoint")
        spec = {"entrypoint": entrypoint, **dict(sorted((common | job["spec"]).items()))}
        spec["rayClusterSpec"] = cluster["spec"]
        metadata = job["metadata"] | {"namespace": cluster["metadata"]["namespace"]}
        whole = job | {"metadata": metadata, "spec": spec}
        name = metadata["name"]
        short = name.removeprefix("tdiff-")
        text = yaml.safe_dump(whole, sort_keys=False, width=10_000, allow_unicode=True)
        out[f"{short}.yaml"] = HEADER.format(overlay=overlay.name, job=short, name=name) + text
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the jobs as plain files.")
    parser.add_argument("overlay", nargs="?", type=Path, help="kustomize folder with a RayCluster; default: gpu-pool's")
    parser.add_argument("folder", nargs="?", type=Path, help="where the files go; default: jobs/")
    args = parser.parse_args()
    if args.overlay and not args.folder:
        parser.error("name the folder for the files too")
    overlay, folder = (args.overlay.resolve(), args.folder) if args.overlay else (OVERLAY, JOBS)
    written = files(overlay)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in written.items():
        (folder / file).write_text(text)


if __name__ == "__main__":
    main()
