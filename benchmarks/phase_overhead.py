"""What a Ray Train job costs beside its steps: from fit() to the first step, and from the last step to the return.

    .venv/bin/python benchmarks/phase_overhead.py [--repeats 5]

Runs the demo's root phase with one epoch, again and again on one local cluster, as growing a tree does.
Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from tdiff import config, launch
from tdiff.data.sources import digits
from tdiff.packing import pack
from tdiff.work.growing import GrowingPhase, grow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    chosen = config.load(None, ["tree.epochs.initial=1"])
    crew = launch.Crew(arguments.workers, arguments.workers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "data"))
        pack(digits(), data, 500)
        connecting = time.time()
        launch.connect(arguments.workers)
        connected = time.time() - connecting
        for k in range(arguments.repeats):
            name = f"{k:02d}-root"
            url = str(Path(folder, name))
            phase = GrowingPhase(name, "root", url, None, None, data, chosen)
            called = time.time()
            launch.fit(grow, phase, crew, chosen.tree.slots, str(Path(url, "checkpoints")), chosen.recovery)
            returned = time.time()
            summary = json.loads(Path(url, "summary.json").read_text())
            rows.append((summary["first_step_at"] - called, returned - summary["last_step_at"]))
            print(f"job {k}: {rows[-1][0]:.2f} s to the first step, {rows[-1][1]:.2f} s after the last one", flush=True)
        launch.disconnect()
    before, after = (statistics.median(row[i] for row in rows) for i in (0, 1))
    result = {
        "benchmark": "phase_overhead",
        "workers": arguments.workers,
        "cpus": os.cpu_count(),
        "repeats": arguments.repeats,
        "seconds_to_connect": round(connected, 2),
        "median_seconds_to_first_step": round(before, 2),
        "median_seconds_after_last_step": round(after, 2),
        "median_seconds": round(statistics.median(sum(row) for row in rows), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
