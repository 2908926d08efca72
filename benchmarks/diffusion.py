"""Steps of stage 2: the U-Net against diffusers' UNet2DModel, its conditioning, its memory. Plain torch is enough.

    .venv/bin/python benchmarks/diffusion.py [--size 28] [--batch 16] [--repeats 3] [--threads 1]

Variants alternate in one process; medians. One thread on a CPU is timed in CPU seconds of this process, which other
jobs on the machine disturb less; anything else in wall seconds. A training step is loss, gradients and fused Adam; a
network evaluation is one forward pass, of which a sample takes 96 (DDIM, 100 steps on the quadratic grid).

1. Training and evaluation against diffusers, in fp32 and each at its best of fp32 and bf16, NCHW and channels-last;
   precision `auto` against fp32. Skipped without diffusers, which gets what is 28 pixels wide as the 32 it is inside.
2. The frozen tree's pass of a training step (walk and path, 10 leaves) and the path encoder, as shares of that step.
3. Optimizer and EMA bytes per rank by arithmetic.
4. On CUDA, for the papers' three shapes: eager fp32 in NCHW, channels-last bf16, and that compiled: img/s, peak memory,
   MFU. FLOPs are what torch counts in the eager step (no recomputation, no optimizer), so the upsampling convs count
   as computed, with 4 weights a place instead of 9. Elsewhere: --compile adds the compiled step to 1.

Prints tables and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tdiff.diffusion.condition import Denoiser, DenoiserSpec
from tdiff.diffusion.process import make_process
from tdiff.diffusion.unet import UNet, UNetSpec
from tdiff.hardware import computes_in_bf16
from tdiff.tree.model import TreeSpec, TreeVAE
from tdiff.tree.topology import Topology

SHAPES = {
    8: UNetSpec(1, 8, 32, (1, 2), attention=(4,)),
    28: UNetSpec(1, 28, 64, (1, 2, 2, 2), attention=(16,)),
    32: UNetSpec(3, 32, 128, (1, 2, 2, 2), attention=(16, 8)),
    64: UNetSpec(3, 64, 128, (1, 2, 2, 2, 4), attention=(16, 8)),
}
PAPERS = {28: 256, 32: 128, 64: 32}
"""Batch of every shape that is measured on CUDA."""
TREES = {
    8: TreeSpec(1, 8, features=5),
    28: TreeSpec(1, 28),
    32: TreeSpec(3, 32, "cnn2", "gaussian", latent_channels=64, feature_channels=128, size=4, residual=True),
    64: TreeSpec(3, 64, "cnn2", "gaussian", latent_channels=64, feature_channels=128, size=4, residual=True),
}
EVALUATIONS = 96
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 FLOP/s of the makers' data sheets (SXM where there are several)."""

Run = Callable[[], object]


class Clock:
    """Seconds of work on a device; see the top of this file."""

    def __init__(self, device: torch.device):
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.now = time.process_time if alone else time.perf_counter

    def seconds(self, run: Run) -> float:
        self._wait()
        start = self.now()
        run()
        self._wait()
        return self.now() - start

    def medians(self, runs: dict[str, Run], repeats: int) -> dict[str, float]:
        """Seconds of every run, one after the other, again and again; the first round warms."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats + 1):
            for name, run in runs.items():
                times[name].append(self.seconds(run))
        return {name: statistics.median(t[1:]) for name, t in times.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@contextmanager
def layout(channels_last: bool) -> Iterator[None]:
    """Has the U-Net take a memory layout instead of its own choice."""

    def chosen(device: torch.device) -> torch.memory_format:
        return torch.channels_last if channels_last else torch.contiguous_format

    with mock.patch("tdiff.diffusion.unet.memory_format", chosen):
        yield


def stepping(
    net: nn.Module, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, bf16: bool
) -> tuple[Run, Run]:
    """A training step on noise prediction, and a network evaluation."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-4, fused=True)
    noise = torch.randn_like(x)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            output = predict(x, t)
        F.mse_loss(output.float(), noise).backward()
        optimizer.step()

    def evaluate() -> None:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            predict(x, t)

    return train, evaluate


# --- 1. against diffusers ----------------------------------------------------------------------


def diffusers_unet(spec: UNetSpec) -> nn.Module | None:
    """diffusers' U-Net of the same shape; None where diffusers is missing. Its attention heads all have one width."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from diffusers import UNet2DModel
    except ImportError:
        return None
    attention = [size in spec.attention for size in spec.resolutions]
    down = tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    up = tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    widths = [spec.width * m for m in spec.multipliers]
    attending = [width for width, a in zip(widths, attention, strict=True) if a] or widths[-1:]
    return UNet2DModel(
        sample_size=spec.padded_size,
        in_channels=spec.channels,
        out_channels=spec.channels,
        layers_per_block=spec.blocks,
        block_out_channels=tuple(widths),
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=attending[0] // spec.heads,
        norm_num_groups=32 if spec.width % 32 == 0 else 8,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        downsample_padding=1,
        dropout=spec.dropout,
    )


def variants(spec: UNetSpec, batch: int, device: torch.device, compiled: bool) -> dict[str, tuple[Run, Run]]:
    """`whose precision layout` -> its training step and its evaluation."""
    x = torch.randn(batch, spec.channels, spec.image_size, spec.image_size, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    y = torch.randn(batch, spec.embedding_size, device=device)
    precisions = {"fp32": False} | ({"bf16": True} if computes_in_bf16(device) else {})
    found: dict[str, tuple[Run, Run]] = {}
    net, other = UNet(spec).to(device), diffusers_unet(spec)
    print(f"parameters: ours {count(net):,}, diffusers {count(other):,}" if other else "diffusers is missing: skipped")
    for precision, bf16 in precisions.items():
        found[f"ours {precision}"] = stepping(net, lambda x, t: net(x, t, y), x, t, bf16)
        if compiled:
            whole = torch.compile(net)
            found[f"ours {precision} compiled"] = stepping(net, lambda x, t, whole=whole: whole(x, t, y), x, t, bf16)
        if other is None:
            continue
        inside = F.pad(x, [(spec.padded_size - spec.image_size) // 2] * 4)
        for name, form in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
            theirs = diffusers_unet(spec)
            assert theirs is not None
            theirs = theirs.to(device, memory_format=form)
            found[f"diffusers {precision} {name}"] = stepping(
                theirs, lambda x, t, theirs=theirs: theirs(x, t).sample, inside.contiguous(memory_format=form), t, bf16
            )
    return found


def against_diffusers(
    spec: UNetSpec, batch: int, repeats: int, device: torch.device, compiled: bool
) -> dict[str, object]:
    clock, found = Clock(device), variants(spec, batch, device, compiled)
    rates: dict[str, dict[str, float]] = {}
    for k, what in enumerate(("training", "evaluation")):
        seconds = clock.medians({name: runs[k] for name, runs in found.items()}, repeats)
        rates[what] = {name: round(batch / s, 2) for name, s in seconds.items()}
    print(f"{'img/s, batch ' + str(batch):32s}{'training':>10s}{'evaluation':>12s}{'sampling':>10s}")
    for name, rate in rates["training"].items():
        evaluation = rates["evaluation"][name]
        print(f"{name:32s}{rate:10.1f}{evaluation:12.1f}{evaluation / EVALUATIONS:10.3f}")
    ratios: dict[str, float] = {}
    for what, rate in rates.items():
        auto = "ours bf16" if "ours bf16" in rate else "ours fp32"
        ratios[f"{what}: auto over our fp32"] = rate[auto] / rate["ours fp32"]
        theirs = {name: r for name, r in rate.items() if name.startswith("diffusers")}
        if theirs:
            in_fp32 = max(r for name, r in theirs.items() if "fp32" in name)
            ratios[f"{what}: fp32 over diffusers' best fp32"] = rate["ours fp32"] / in_fp32
            ours = max(rate["ours fp32"], rate[auto])
            ratios[f"{what}: best over diffusers' best"] = ours / max(theirs.values())
            ratios[f"{what}: best over diffusers' fp32 NCHW"] = ours / theirs["diffusers fp32 NCHW"]
    for name, ratio in ratios.items():
        print(f"{name:50s}{ratio:6.2f}")
    return {"images_per_second": rates, "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}}


# --- 2. conditioning ---------------------------------------------------------------------------


def balanced(leaves: int) -> Topology:
    tree = Topology.root_with_two_leaves("bench")
    while len(tree.leaves) < leaves:
        tree = tree.split(min(tree.leaves, key=lambda leaf: (tree[leaf].depth, leaf)), "bench")
    return tree


def conditioning(size: int, batch: int, repeats: int, device: torch.device) -> dict[str, object]:
    spec, shape = SHAPES[size], TREES[size]
    tree = TreeVAE(shape, balanced(10)).to(device).eval().requires_grad_(False)
    nodes, latent = len(tree.topology.nodes), shape.latent_channels * shape.size**2
    denoiser = Denoiser(DenoiserSpec(spec, "path", "index", nodes, latent)).to(device)
    assert denoiser.path_encoder is not None
    encoder, process, bf16 = denoiser.path_encoder, make_process("noise", 1000), computes_in_bf16(device)
    images = torch.rand(batch, spec.channels, size, size, device=device)
    t, noise = torch.randint(0, 1000, (batch,), device=device), torch.randn_like(images)
    rng = torch.Generator(device).manual_seed(0)
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-4, fused=True)

    @torch.no_grad()
    def pass_tree():  # type: ignore[no-untyped-def]
        return tree.path(tree.walk(images, rng), rng)

    path = pass_tree()

    def step() -> None:
        told = pass_tree()
        optimizer.zero_grad()

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            output: Tensor = denoiser(x_t, t, told)
            return output

        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = process.loss(predict, 2 * images - 1, t, noise).mean
        loss.backward()
        optimizer.step()

    runs: dict[str, Run] = {"step": step, "tree": pass_tree, "encoder": lambda: encoder(path).sum().backward()}
    seconds = Clock(device).medians(runs, repeats)
    shares = {name: seconds[name] / seconds["step"] for name in ("tree", "encoder")}
    print(
        f"conditioning, batch {batch}, {'bf16' if bf16 else 'fp32'}: step {seconds['step'] * 1e3:.0f} ms, of it the "
        f"tree's pass {seconds['tree'] * 1e3:.1f} ms ({shares['tree']:.1%}), the path encoder "
        f"{seconds['encoder'] * 1e3:.1f} ms ({shares['encoder']:.1%})"
    )
    return {name: round(share, 4) for name, share in shares.items()}


# --- 3. memory ---------------------------------------------------------------------------------


def bytes_per_rank() -> dict[str, object]:
    """P parameters on D ranks: Adam keeps two fp32 moments, 8 P / D, an EMA 4 P / D, ZeRO 1-3 fp32 masters 4 P / D.

    Without ZeRO every rank has all (D = 1), and its weights are the masters.
    """
    table: dict[str, object] = {}
    print("\nMB per rank, optimizer 8 P / D + EMA 4 P / D, D = 1 without ZeRO; with ZeRO 1-3 also masters 4 P / D")
    for size in PAPERS:
        with torch.device("meta"):
            parameters = count(UNet(SHAPES[size]))
        shares = {"ZeRO 0": 1} | {f"ZeRO 1-3, {workers} workers": workers for workers in (1, 2, 4)}
        print(f"{size} px, P = {parameters:,}")
        for name, ranks in shares.items():
            optimizer, ema = 8 * parameters // ranks, 4 * parameters // ranks
            table[f"{size} px, {name}"] = {"optimizer": optimizer, "ema": ema}
            print(f"    {name:22s}{optimizer / 1e6:8.1f} + {ema / 1e6:.1f}")
    return table


# --- 4. CUDA -----------------------------------------------------------------------------------


def cuda_rows(size: int, batch: int, repeats: int, peak: float | None, device: torch.device) -> dict[str, Any]:
    spec, clock = SHAPES[size], Clock(device)
    x = torch.randn(batch, spec.channels, size, size, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    y = torch.randn(batch, spec.embedding_size, device=device)
    with FlopCounterMode(display=False) as counter:
        UNet(spec).to(device)(x[:2], t[:2], y[:2]).sum().backward()
    flops = counter.get_total_flops() / 2 * batch
    rows: dict[str, Any] = {}
    for name, bf16, channels_last, compiled in (
        ("eager fp32 NCHW", False, False, False),
        ("eager bf16 NCHW", True, False, False),
        ("eager bf16 channels-last", True, True, False),
        ("compiled bf16 channels-last", True, True, True),
    ):
        gc.collect()
        torch.cuda.empty_cache()
        net = UNet(spec).to(device)
        if compiled:
            net.compile()
        with layout(channels_last):
            train, evaluate = stepping(net, lambda x, t, net=net: net(x, t, y), x, t, bf16)
            train()  # allocates Adam's moments, compiles
            torch.cuda.reset_peak_memory_stats()
            seconds = {"training": 0.0, "evaluation": 0.0}
            for what, run in (("training", train), ("evaluation", evaluate)):
                seconds[what] = clock.medians({what: run}, 4 * repeats)[what]
                if what == "training":
                    memory = torch.cuda.max_memory_allocated()
        mfu = flops / seconds["training"] / peak if peak else None
        rows[name] = {
            "training": round(batch / seconds["training"], 1),
            "evaluation": round(batch / seconds["evaluation"], 1),
            "mfu": mfu and round(mfu, 4),
            "peak_bytes": memory,
        }
        print(
            f"{size} px, batch {batch}, {name:28s} training {rows[name]['training']:9.1f} img/s  evaluation "
            f"{rows[name]['evaluation']:9.1f} img/s  MFU {'?' if mfu is None else f'{mfu:.1%}'}  "
            f"peak {memory / 2**30:.2f} GiB",
            flush=True,
        )
    rows["speedup"] = round(rows["compiled bf16 channels-last"]["training"] / rows["eager fp32 NCHW"]["training"], 2)
    rows["gflops_per_image"] = round(flops / batch / 1e9, 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=28, choices=sorted(SHAPES), help="pixels")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="the compiled U-Net in 1 as well (minutes on a CPU)")
    parser.add_argument("--peak", type=float, help="FLOP/s in bf16, where the GPU is not among the known")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, repeats = torch.device(arguments.device), arguments.repeats
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = arguments.peak or next((flops for part, flops in PEAKS.items() if part in name), None)
    result = {
        "benchmark": "diffusion",
        "torch": torch.__version__,
        "device": name,
        "threads": arguments.threads,
        "cpus": os.cpu_count(),
        "size": arguments.size,
        "batch": arguments.batch,
        "fast_bf16": computes_in_bf16(device),
        "unet": against_diffusers(SHAPES[arguments.size], arguments.batch, repeats, device, arguments.compile),
        "conditioning": conditioning(arguments.size, arguments.batch, repeats, device),
        "bytes_per_rank": bytes_per_rank(),
    }
    if device.type == "cuda":
        result["cuda"] = {size: cuda_rows(size, batch, repeats, peak, device) for size, batch in PAPERS.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
