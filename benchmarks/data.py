"""The reader against others, on one core: python benchmarks/data.py [--repeats 3] [--run RUN]

Packs Fashion-MNIST's 60,000 training images (Debian's package dataset-fashion-mnist, or --source-dir) and reads them in
shuffled batches of 256, each variant in a process of its own that is held to one core:

    ours      tdiff.data.stream: the first epoch (shards read, checked, decoded), later ones (from the decoded cache)
    wds       plain wds.WebDataset + DataLoader over the same shards
    mosaicml  mosaicml-streaming over its own format (PNG as well), in a venv of its own; skipped, with the
              reason, if it cannot be installed

from the local disk and from an S3 server (rclone, on the other core). Then the memory that a set ten times larger than
the cache takes, epoch by epoch. With --run RUN also the share of a run's steps that waited for data. Medians over
--repeats, interleaved. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 256
EPOCHS = 4


def rate(images: int, started: float) -> float:
    return images / (time.perf_counter() - started)


def ours(url: str, cache: str) -> dict[str, float]:
    from tdiff.data.order import Order
    from tdiff.data.shards import read_manifest
    from tdiff.data.stream import Batches, Reader
    from tdiff.work.reading import as_images

    shutil.rmtree(cache, ignore_errors=True)
    reader = Reader(url, read_manifest(url), "train", Path(cache), 10**10)
    order = Order(reader.counts(), BATCH, 1, 0, "benchmark", 8192)
    batches = Batches(reader, order, EPOCHS * order.steps_per_epoch)
    rates = []
    for epoch in range(EPOCHS):
        started = time.perf_counter()
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            as_images(batches(step, 0))
        rates.append(rate(order.steps_per_epoch * BATCH, started))
    return {"first": rates[0], "later": statistics.median(rates[1:])}


def wds(urls: list[str]) -> dict[str, float]:
    import torch
    import webdataset
    from torch.utils.data import DataLoader

    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(8192)
    data = data.decode("l8").to_tuple("png", "cls").batched(BATCH)
    count, started = 0, time.perf_counter()
    for images, _ in DataLoader(data, batch_size=None, num_workers=0):
        torch.as_tensor(images).float().div_(255)
        count += len(images)
    return {"first": rate(count, started)}


def mosaicml(folder: str, remote: str | None) -> dict[str, float]:
    import numpy as np
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Data(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(index)
            return torch.from_numpy(np.array(sample["image"])), sample["label"]

    clean_stale_shared_memory()
    if remote:
        shutil.rmtree(folder, ignore_errors=True)
    data = Data(local=folder, remote=remote, shuffle=True, batch_size=BATCH)
    rates = []
    for _ in range(2):
        count, started = 0, time.perf_counter()
        for images, _ in torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=0, drop_last=True):
            images.float().div_(255)
            count += len(images)
        rates.append(rate(count, started))
    return {"first": rates[0], "later": rates[1]}


def write_mosaicml(folder: str, arrays: str) -> dict[str, float]:
    import numpy as np
    from PIL import Image
    from streaming import MDSWriter

    loaded = np.load(arrays)
    with MDSWriter(out=folder, columns={"image": "png", "label": "int"}, hashes=["sha1"]) as writer:
        for image, label in zip(loaded["images"], loaded["labels"], strict=True):
            writer.write({"image": Image.fromarray(image[0]), "label": int(label)})
    return {}


def memory(folder: str) -> dict[str, Any]:
    """Resident memory after every epoch over a set that is ten times larger than the cache."""
    import numpy as np

    from tdiff.data.order import Order
    from tdiff.data.shards import read_manifest
    from tdiff.data.stream import Batches, Reader

    def resident() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3, 1)

    manifest = read_manifest(folder)
    decoded = manifest.samples("train") * int(np.prod(manifest.shape))
    reader = Reader(folder, manifest, "train", Path(folder).parent / "small-cache", decoded // 10)
    order = Order(reader.counts(), 128, 2, 0, "benchmark", 1024)
    batches = Batches(reader, order, 12 * order.steps_per_epoch)
    before, after = resident(), []
    for epoch in range(12):
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            for slot in range(2):
                batches(step, slot)
        after.append(resident())
    return {"set_mb": decoded / 1e6, "cache_mb": decoded / 1e7, "rss_mb_before": before, "rss_mb_after_epochs": after}


# --- the main process ----------------------------------------------------------------------------------


def pinned(command: list[str], core: int, **extra: str) -> Any:
    """Runs a variant on one core; what its last line says."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | extra
    held = ["taskset", "-c", str(core), *command]
    out = subprocess.run(held, check=True, capture_output=True, text=True, env=env)
    return json.loads(out.stdout.splitlines()[-1])


def this(*arguments: str, python: str = sys.executable) -> list[str]:
    return [python, __file__, "--variant", *arguments]


def mosaicml_python(folder: Path) -> str | None:
    """A Python that has mosaicml-streaming; None, having said why, if it cannot be installed."""
    python = folder / "bin" / "python"
    uv = Path(sys.executable).with_name("uv")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, text=True)
        install = [str(uv), "pip", "install", "--python", str(python), "mosaicml-streaming"]
        subprocess.run(install, check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"mosaicml-streaming is skipped: {getattr(error, 'stderr', None) or error}")
        return None
    return str(python)


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """rclone's S3 server over a folder, without keys, on the second core; its endpoint."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    rclone = str(Path(sys.executable).with_name("rclone"))
    server = subprocess.Popen(
        ["taskset", "-c", "1", rclone, "serve", "s3", str(folder), "--addr", address, "--vfs-cache-mode", "off"],
        stderr=subprocess.DEVNULL,
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0:
                return server, f"http://{address}"
        time.sleep(0.1)
    raise RuntimeError("rclone's S3 server does not start")


def data_wait(run: str) -> dict[str, float]:
    """Share of a run's training time that waited for data, in all tree phases together and in the diffusion."""
    stages: dict[str, list[dict[str, float]]] = {"tree": [], "diffusion": []}
    for summary in Path(run).rglob("summary.json"):
        seconds = json.loads(summary.read_text()).get("seconds")
        if seconds:
            stages["diffusion" if summary.parent.name == "diffusion" else "tree"].append(seconds)
    return {
        stage: round(sum(s["data"] for s in found) / sum(s["train"] for s in found), 4)
        for stage, found in stages.items()
        if found
    }


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(result[key] for result in results)) for key in results[0]}


def compare(folder: Path, source_dir: str | None, repeats: int) -> dict[str, Any]:
    pack = [sys.executable, "-m", "tdiff.pack", "fashion-mnist", str(folder / "s3/data/fashion")]
    subprocess.run(
        [*pack, "--shard-samples", "1000", *(["--source-dir", source_dir] if source_dir else [])], check=True
    )
    local = str(folder / "s3/data/fashion")
    tars = sorted(str(tar) for tar in Path(local, "train").glob("*.tar"))
    other = mosaicml_python(folder / "venv")
    mds = str(folder / "s3/data/mds")
    if other:
        import numpy as np

        from tdiff.data.shards import read_manifest
        from tdiff.data.stream import read_split

        images = read_split(local, read_manifest(local), "train")
        np.savez(folder / "arrays.npz", images=images.images, labels=images.labels)
        pinned(this("write-mosaicml", mds, str(folder / "arrays.npz"), python=other), 0)

    server, endpoint = serve(folder / "s3")
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    s3 = keys | {"AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint}
    piped = [f"pipe:curl -sf {endpoint}/{Path(tar).relative_to(folder / 's3')}" for tar in tars]
    results: dict[str, list[dict[str, float]]] = {}
    try:
        for _ in range(repeats):
            found = {
                "disk ours": pinned(this("ours", local, str(folder / "cache")), 0),
                "disk wds": pinned(this("wds", *tars), 0),
                "s3 ours": pinned(this("ours", "s3://data/fashion", str(folder / "cache")), 0, **s3),
                "s3 wds": pinned(this("wds", *piped), 0),
            }
            if other:
                found["disk mosaicml"] = pinned(this("mosaicml", mds, python=other), 0)
                found["s3 mosaicml"] = pinned(
                    this("mosaicml", str(folder / "copy"), "s3://data/mds", python=other), 0, **s3
                )
            for name, result in found.items():
                results.setdefault(name, []).append(result)
    finally:
        server.kill()
        server.wait()
    return {name: medians(of) for name, of in sorted(results.items())}


def pack_noise(folder: Path) -> None:
    """20,000 images of 32x32x3: 61 MB decoded."""
    import numpy as np

    from tdiff.data.sources import Source, Split
    from tdiff.packing import pack

    images = np.random.default_rng(0).integers(0, 256, (20_000, 3, 32, 32), dtype=np.uint8)
    pack(Source("noise", {"train": Split(images, None)}, None), str(folder), 500)


def main() -> None:
    if "--variant" in sys.argv:
        _, _, variant, *arguments = sys.argv
        result = {
            "ours": lambda: ours(*arguments),
            "wds": lambda: wds(arguments),
            "mosaicml": lambda: mosaicml(arguments[0], arguments[1] if arguments[1:] else None),
            "write-mosaicml": lambda: write_mosaicml(*arguments),
            "memory": lambda: memory(*arguments),
        }[variant]()
        print(json.dumps(result))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-dir", help="folder of Fashion-MNIST's IDX files (default: where Debian puts them)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", help="a finished run's folder, for the share of its steps that waited for data")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tdiff-data-") as name:
        folder = Path(name)
        rates = compare(folder, chosen.source_dir, chosen.repeats)
        pack_noise(folder / "noise")
        rss = pinned(this("memory", str(folder / "noise")), 0)
    result: dict[str, Any] = {"images_per_second_and_core": rates, "memory": rss}
    for place in ("disk", "s3"):
        mine = rates[f"{place} ours"]
        result[place] = {"later over first": round(mine["later"] / mine["first"], 1)}
        for other in ("wds", "mosaicml"):
            if f"{place} {other}" in rates:
                best = max(rates[f"{place} {other}"].values())
                result[place][f"first over {other}'s best"] = round(mine["first"] / best, 2)
    if chosen.run:
        result["data_wait"] = data_wait(chosen.run)
    for key, value in rates.items():
        print(f"{key:<14} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
