"""What training costs in bytes, seconds and money: plain arithmetic on plain numbers, and what machines can do.

Legend: P parameters, W workers, S slots, M images, L leaves, R = L - 1 nodes with routers.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Kind:
    """What one worker computes on: a GPU, or one core of a CPU.

    memory: GB. bf16, fp32: TFLOP/s of dense matrix products, by the makers. price: dollars an hour for one, a usual one
    of clouds on demand, to be overridden. network: GB/s to other nodes for one. efficiency: share of the peak that
    training reaches; None: the peaks are measured themselves. kernel: seconds that launching one takes; together: a
    launch runs beside the computation (GPUs), else it adds up.
    """

    memory: float
    bf16: float
    fp32: float
    price: float
    network: float
    efficiency: float | None = 0.25
    kernel: float = 10e-6
    together: bool = True


KINDS = {
    "b200": Kind(180, 2250, 75, 5.0, 50),
    "h200": Kind(141, 989, 67, 3.5, 50),
    "h100": Kind(80, 989, 67, 2.8, 50),
    "a100": Kind(80, 312, 19.5, 1.8, 25),
    "l40s": Kind(48, 362, 91.6, 1.1, 3),
    "a10g": Kind(24, 70, 31.2, 0.8, 3),
    "l4": Kind(24, 121, 30.3, 0.6, 3),
    # BENCHMARKS.md, one core of an AMD EPYC, one thread: the U-Net of 28 px at batch 16 by 22.8 (bf16) and 15.9 (fp32)
    # images a second; seconds a kernel by the tree's steps at 2 and 10 leaves, whose convs are slower: see TREE_SHARE.
    "cpu": Kind(12, 0.215, 0.147, 0.04, 1, None, 24e-6, together=False),
}
"""By name. None but `cpu` was ever measured here: their peaks are from data sheets, their prices change."""

TREE_SHARE = 0.8
"""What the tree's small convolutions reach of the rate of a U-Net's on a CPU: 118 of 147 GFLOP/s (BENCHMARKS.md)."""


# --- memory on a worker ------------------------------------------------------------------------------


def bytes_per_rank(parameters: int, zero: int, workers: int, emas: int = 0) -> int:
    """Bytes of fp32 weights, gradients, Adam's two moments and EMAs on one worker under a ZeRO stage.

    ZeRO 1 shares moments, masters and EMAs among the workers, 2 the gradients too, 3 the weights too. fp32 masters
    beside the weights exist from ZeRO 1 on. Measured in BENCHMARKS.md, "Memory per rank".
    """
    weights = gradients = 4 * parameters
    moments_and_emas = (8 + 4 * emas) * parameters
    if zero == 0:
        return weights + gradients + moments_and_emas
    partitioned = (moments_and_emas + 4 * parameters) / workers
    gradients_kept = gradients / workers if zero >= 2 else gradients
    weights_kept = weights / workers if zero == 3 else weights
    return int(weights_kept + gradients_kept + partitioned)


def transient_bytes(parameters: int, zero: int) -> int:
    """Bytes that a worker holds besides while a step runs: DeepSpeed's bucket for gradients, from ZeRO 1 on, of up to
    5e8 numbers; under ZeRO 3 also the gathered weights, of up to DeepSpeed's 1e9 live numbers.
    """
    bucket = 4 * min(parameters, 500_000_000) if zero else 0
    return bucket + (4 * min(parameters, 1_000_000_000) if zero == 3 else 0)


def decision_bytes(images: int, leaves: int) -> int:
    """Bytes of the routing probabilities (float32, [M, R]) and labels (int64, [M]) of all images."""
    return images * (4 * (leaves - 1) + 8)


def reach_bytes(images: int, leaves: int) -> int:
    """Bytes, in float64, of the reach of all 2 L - 1 nodes and the columns it is computed from, for so many images."""
    return images * 8 * (2 * leaves - 1 + leaves - 1)


def checkpoint_bytes(parameters: int, emas: int = 0) -> int:
    """Bytes of a resume checkpoint (`tdiff.checkpoints`), over all workers: weights, moments and EMAs in fp32."""
    return (12 + 4 * emas) * parameters


# --- network -----------------------------------------------------------------------------------------


def bytes_per_step(parameters: int, zero: int, workers: int, passes: int) -> int:
    """Bytes that a worker sends (and receives) in a step of so many passes (slots one after the other).

    Rings: gathering or reducing P numbers moves (W - 1) / W of them. ZeRO 0 and 1 add up gradients and reduce them once
    a step, 2 and 3 after each pass; 0 hands all of them to all workers, 1 and 2 gather the new weights; 3 gathers the
    weights twice a pass (Rajbhandari et al., 2020, section 7).
    """
    if workers == 1:
        return 0
    rounds = {0: 2, 1: 2, 2: passes + 1, 3: 3 * passes}[zero]
    return int(rounds * (workers - 1) / workers * 4 * parameters)


def needed_bandwidth(sent: int, seconds: float, share: float = 0.1) -> float:
    """GB/s at which what a step sends takes at most this share of the seconds that the step computes."""
    return sent / (share * seconds) / GB


# --- seconds -----------------------------------------------------------------------------------------


def pass_seconds(flops: float, kernels: float, rate: float, kernel: float, together: bool) -> float:
    """Seconds of a pass with so many FLOPs at `rate` FLOP/s, and so many kernels that take `kernel` seconds to launch,
    together with the computation or besides.
    """
    computing, launching = flops / rate, kernels * kernel
    return max(computing, launching) if together else computing + launching


# --- data --------------------------------------------------------------------------------------------


def frozen_bytes(members: int, numbers: int) -> int:
    """Bytes that every worker of a split keeps of what the frozen tree says of a leaf's members, in float32."""
    return 4 * members * numbers


def block_bytes(image_bytes: int, block: int, part: int, slots: int, steps_per_epoch: int) -> int:
    """Bytes of decoded images in a worker's memory: two blocks for each of the slots that it serves, in whole steps."""
    steps = min(max(1, block // part), steps_per_epoch)
    return 2 * slots * steps * part * image_bytes
