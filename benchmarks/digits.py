"""The demo's quality and time over several seeds: clusters on the 297 held-out digits, samples, seconds.

    .venv/bin/python benchmarks/digits.py [--seeds 0 1 2 3] [--runs DIR]

Runs `python -m tdiff.train seed=S` one after the other (about 7 minutes each on 2 cores) and prints a table and
one JSON line. A finished run is not run again:
its `wall_seconds` are then those of finding that out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--runs", default="runs/benchmark-digits")
    parser.add_argument("settings", nargs="*", help="settings a.b=c for every run")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        name = f"seed-{seed}"
        settings = [f"name={name}", f"seed={seed}", f"runs={arguments.runs}", *arguments.settings]
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "tdiff.train", *settings], check=True, stdout=subprocess.DEVNULL)
        wall = time.monotonic() - started
        numbers = json.loads(Path(arguments.runs, name, "evaluation.json").read_text())
        tree, samples = numbers["clustering"]["tree_test"], numbers["samples"]
        row = {
            "seed": seed,
            "leaves": numbers["leaves"],
            "nmi": tree["nmi"],
            "acc": tree["acc"],
            "dendrogram_purity": tree["dendrogram_purity"],
            "kmeans_nmi": numbers["clustering"]["kmeans_test"]["nmi"],
            "kmeans_acc": numbers["clustering"]["kmeans_test"]["acc"],
            "ward_nmi": numbers["clustering"]["ward_test"]["nmi"],
            "ward_acc": numbers["clustering"]["ward_test"]["acc"],
            "frechet_treediffusion": samples["treediffusion"]["classifier_frechet_gen"],
            "frechet_treevae": samples["treevae"]["classifier_frechet_gen"],
            "precision_treediffusion": samples["treediffusion"]["classifier_precision_gen"],
            "recall_treediffusion": samples["treediffusion"]["classifier_recall_gen"],
            "phase_seconds": sum(numbers["seconds"].values()),
            "wall_seconds": wall,
        }
        rows.append(row)
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    means = {key: round(statistics.mean(float(row[key]) for row in rows), 4) for key in rows[0] if key != "seed"}
    print(json.dumps({"benchmark": "digits", "seeds": arguments.seeds, "mean": means, "runs": rows}))


if __name__ == "__main__":
    main()
