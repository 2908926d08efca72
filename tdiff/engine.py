"""The one training loop, for both stages. It knows no tree and no diffusion.

A stage hands over a `Task`: an objective, its batches, its schedule. The loop, per step:

    for each of this worker's slots: batch -> loss -> backward     (slots s = rank mod workers)
    average over the slots: a finite loss?, metrics, batch-norm statistics
    update: clip, learning rate, optimizer, EMAs
    now and then: metrics, snapshots of the EMAs, a resume checkpoint

A global batch is `slots` fixed parts, so what a step computes does not depend on how many workers share
them. State is a function of progress: batches and random draws follow from (seed, phase, step, slot), so a
checkpoint is weights, optimizer moments, EMAs and the step.

Two back-ends with one interface: DeepSpeed (ZeRO, in a process group) and plain PyTorch (one process).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdiff.errors import ConfigError, NonFiniteError
from tdiff.seeds import generator, seed_of
from tdiff.tracking import MetricParts

Batch = dict[str, Tensor]


class Worker(Protocol):
    """This process's place among the workers, and where its resume checkpoints go."""

    rank: int
    world: int

    def restored(self) -> AbstractContextManager[Path | None]:
        """Local folder of the checkpoint to go on from, if there is one, for as long as it is read."""

    def keep(self, directory: Path) -> None:
        """Makes a checkpoint durable; called by all workers, each with a folder of its own files."""


class Averager(Protocol):
    """Keeps averages of tensors over training (an EMA)."""

    def update(self, step: int) -> None: ...

    averages: list[Tensor]


class Snapshots(Protocol):
    """Keeps averages as they are after some steps of training; only worker 0's is used."""

    @property
    def steps(self) -> Collection[int]: ...
    @property
    def tracks(self) -> Collection[str]:
        """Names of the averages to keep."""

    def start(self, step: int) -> None:
        """Training goes on after so many steps: what a killed run kept of later ones is removed."""

    def write(self, step: int, track: str, average: dict[str, Tensor]) -> None:
        """Makes an average durable, as full named tensors on the CPU."""


@dataclass(frozen=True)
class Validation:
    """The same batches with the same noise again and again, in evaluation mode, on the weights as they are by then."""

    steps: Collection[int]
    """After which steps."""
    batches: int
    """How many every slot has."""
    batch: Callable[[int, int], Batch]
    """(number, slot) -> tensors, as in `Task`."""
    summary: Callable[[dict[str, float]], dict[str, float]]
    """Means over all batches of the loss and of what the objective gives in evaluation mode -> metrics."""


class StepNorm(Protocol):
    """A batch norm whose running statistics move once a step (`tdiff.tree.layers.SlotBatchNorm`)."""

    slot_mean: Tensor
    slot_var: Tensor

    def move_running_statistics(self) -> None: ...


@dataclass
class Task:
    """What a stage trains. Progress is counted in steps of `batch_size` images."""

    phase: str
    objective: nn.Module
    """forward(batch, step, rng) -> (loss, {metric: scalar tensor}); trains its parameters that require gradients."""
    batch: Callable[[int, int], Batch]
    """(step, slot) -> the tensors of that slot."""
    steps: int
    batch_size: int
    slots: int
    seed: int
    learning_rate: Callable[[int], float]
    weight_decay: float = 0.0
    clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    zero: int = 0
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """What DeepSpeed is told besides, checked by `check_deepspeed`; its ZeRO stage is `zero`."""
    autocast: bool = False
    """bf16 autocast over fp32 weights."""
    checkpoint_images: int = 500_000
    norms: Iterable[StepNorm] = ()
    average: Callable[[list[Tensor]], Mapping[str, Averager]] | None = None
    """The tensors that this worker's optimizer moves -> the averages to keep of them, by name."""
    snapshots: Snapshots | None = None
    validation: Validation | None = None
    metrics_url: str | None = None
    log_every: int = 10


class Backend(Protocol):
    """How gradients become an update."""

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]: ...
    def backward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]: ...
    def update(self, learning_rate: float) -> float:
        """Moves the weights, unless the gradient's norm, which it returns, is not finite."""

    def masters(self) -> list[Tensor]: ...
    def gathered(self, averages: list[Tensor]) -> dict[str, Tensor]: ...
    def scatter(self, averages: list[Tensor], full: dict[str, Tensor]) -> None: ...
    def save(self, directory: Path) -> None: ...
    def load(self, directory: Path) -> None: ...


def _trainable(objective: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


class PlainBackend:
    """One process, no DeepSpeed: for machines with nothing else, and for fast tests."""

    def __init__(self, task: Task):
        self.task = task
        self.parameters = _trainable(task.objective)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=0.0, weight_decay=task.weight_decay, fused=True)

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(iter(batch.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.task.autocast):
            loss, metrics = self.task.objective(batch, step, rng)
        return loss, metrics

    def backward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.forward(batch, step, rng)
        (loss / self.task.slots).backward()
        return loss.detach(), metrics

    def update(self, learning_rate: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.task.clip or math.inf))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def masters(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters.values()]

    def gathered(self, averages: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.parameters, averages, strict=True))

    def scatter(self, averages: list[Tensor], full: dict[str, Tensor]) -> None:
        for name, average in zip(self.parameters, averages, strict=True):
            average.copy_(full[name])

    def save(self, directory: Path) -> None:
        state = {"objective": self.task.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, directory / "plain.pt")

    def load(self, directory: Path) -> None:
        # A resume checkpoint of one's own run; weights_only all the same.
        state = torch.load(directory / "plain.pt", weights_only=True, map_location="cpu")
        self.task.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])


class Piece(NamedTuple):
    """The numbers start..start+size of a parameter, which lie from `place` on in a worker's master."""

    name: str
    start: int
    size: int
    master: int
    place: int

    def of(self, full: Tensor) -> Tensor:
        """A view of these numbers of the whole parameter, [size]."""
        return full.view(-1)[self.start : self.start + self.size]

    def of_master(self, masters: list[Tensor]) -> Tensor:
        """The same of masters, or of averages of them."""
        return masters[self.master][self.place : self.place + self.size]


class DeepSpeedBackend:
    """A DeepSpeed engine in the process group that is already up (Ray Train's)."""

    def __init__(self, task: Task, world: int):
        deepspeed = _import_deepspeed()
        self.task = task
        self.parameters = _trainable(task.objective)
        optimizer = torch.optim.Adam(self.parameters.values(), lr=0.0, weight_decay=task.weight_decay, fused=True)
        # DeepSpeed allocates its bucket as large as it may become: 2 GB by default, for models of any size.
        numbers = sum(p.numel() for p in self.parameters.values())
        sharing = {"reduce_bucket_size": min(numbers, 500_000_000), **task.deepspeed.get("zero_optimization", {})}
        settings: dict[str, Any] = {
            "train_batch_size": task.batch_size,
            "train_micro_batch_size_per_gpu": task.batch_size // task.slots,
            "gradient_accumulation_steps": task.slots // world,
            "gradient_clipping": task.clip if task.zero else 0.0,  # without ZeRO `update` clips
            **task.deepspeed,
            "zero_optimization": {**sharing, "stage": task.zero},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
        }
        if task.autocast:
            # By default DeepSpeed would also round gradients, and ZeRO 3 weights, on their way between workers.
            safe: list[str] = []
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": safe}
        self.engine, *_ = deepspeed.initialize(
            model=task.objective,
            model_parameters=list(self.parameters.values()),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.engine(batch, step, rng)
        return loss, metrics

    def backward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.forward(batch, step, rng)
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-step
        return loss.detach(), metrics

    def update(self, learning_rate: float) -> float:
        norm = 0.0
        if self.task.zero == 0:
            # DeepSpeed knows no norm without ZeRO; the gradients are averaged over the workers already.
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.task.clip or math.inf))
            if not math.isfinite(norm):
                return norm
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        # With ZeRO, DeepSpeed silently leaves out an update whose norm is not finite, and says inf here.
        return norm if self.task.zero == 0 else float(self.engine.get_global_grad_norm())

    def masters(self) -> list[Tensor]:
        """The fp32 tensors that this worker's optimizer moves: its partition, or without ZeRO every parameter."""
        if self.task.zero == 0:
            return [p.detach() for p in self.parameters.values()]
        if self.task.zero == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def gathered(self, averages: list[Tensor]) -> dict[str, Tensor]:
        if self.task.zero == 0:
            return dict(zip(self.parameters, averages, strict=True))
        # One collective for all parameters; every number is one worker's plus zeros, so the sum is exact.
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.parameters.items()}
        flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=averages[0].device)
        full = dict(zip(shapes, flat.split([shape.numel() for shape in shapes.values()]), strict=True))
        for piece in self._pieces():
            piece.of(full[piece.name]).copy_(piece.of_master(averages))
        dist.all_reduce(flat)
        return {name: full[name].view(shape) for name, shape in shapes.items()}

    def scatter(self, averages: list[Tensor], full: dict[str, Tensor]) -> None:
        if self.task.zero == 0:
            for name, average in zip(self.parameters, averages, strict=True):
                average.copy_(full[name])
            return
        for piece in self._pieces():
            piece.of_master(averages).copy_(piece.of(full[piece.name]))

    def _pieces(self) -> Iterator[Piece]:
        """What this worker's masters hold of each parameter, under ZeRO 1, 2 and 3."""
        for name, parameter in self.parameters.items():
            p: Any = parameter
            if self.task.zero == 3:
                optimizer = self.engine.optimizer
                master, place, share = optimizer.grad_position[optimizer.get_param_id(p)]
                start = share * dist.get_rank()
                size = min(share, p.ds_numel - start)  # the last shares are padded
                if size > 0:
                    yield Piece(name, start, size, master, place)
            elif (held := p._hp_mapping) is not None:
                here, there = held.lp_fragment_address, held.hp_fragment_address
                yield Piece(name, here.start, here.numel, held.param_group_index, there.start)

    def save(self, directory: Path) -> None:
        self.engine.save_checkpoint(str(directory), tag="deepspeed", save_latest=False)

    def load(self, directory: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(directory), tag="deepspeed")
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load the resume checkpoint in {directory}")


def _import_deepspeed(distributed: bool = True) -> Any:
    """DeepSpeed, without the half minute in which it would compile an op that training on CPUs never calls.

    distributed: whether it joins the process group that is up, or is only to be asked something.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # DeepSpeed's autotuner imports MLflow if it can (1.1 of 1.3 s); workers use neither.
    hide_mlflow = "mlflow" not in sys.modules
    if hide_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops
    finally:
        if hide_mlflow:
            del sys.modules["mlflow"]

    if not torch.cuda.is_available():
        # Only inference collectives use it; init_distributed would build it whenever a compiler is there.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    if distributed and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


DEEPSPEED_KEYS = (
    "zero_optimization",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
)
"""What a file of DeepSpeed settings may hold: how work is shared and watched, nothing that results depend on."""


ZERO_KEYS = (
    "stage",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "allgather_partitions",
    "reduce_scatter",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "round_robin_gradients",
)
"""Of its section zero_optimization: not what rounds (ZeRO++), nor what moves the partitions elsewhere (offloading)."""


def check_deepspeed(settings: Mapping[str, Any], zero: int) -> None:
    """Raises ValueError, one sentence, where settings of a file are none for a training with this ZeRO stage."""
    for key in settings:
        if key not in DEEPSPEED_KEYS:
            raise ValueError(f"{key} cannot be set there: take one of {', '.join(DEEPSPEED_KEYS)}")
    section = settings.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        raise ValueError(f"zero_optimization is {section!r}: it should be a section")
    for key in section:
        if key not in ZERO_KEYS:
            raise ValueError(f"zero_optimization.{key} cannot be set there: take one of {', '.join(ZERO_KEYS)}")
    if (stage := section.get("stage", zero)) != zero:
        raise ValueError(f"its ZeRO stage is {stage!r} and diffusion.zero is {zero}: make them equal")
    _import_deepspeed(distributed=False)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"zero_optimization.{name}={first['input']!r} cannot be used: {first['msg']}") from error


def average_over_workers(values: list[Tensor], world: int) -> None:
    """Means over the workers, in place, in one collective for all tensors."""
    if world == 1 or not values:
        return
    flat = torch.cat([value.reshape(-1).float() for value in values])
    dist.all_reduce(flat)
    flat /= world
    for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.copy_(part.view_as(value))


@dataclass
class Outcome:
    """What training leaves: averages of the weights, and where the time went."""

    averages: dict[str, dict[str, Tensor]]
    """name of the average -> full named tensors on the CPU."""
    seconds: dict[str, float]
    """Seconds spent on setup, train, and of the latter on data, validation, snapshots and checkpoint."""
    first_step_at: float
    """Unix time before the first step, and after the last one."""
    last_step_at: float


def train(task: Task, worker: Worker) -> Outcome:
    """Trains to the end, going on from the worker's checkpoint if it has one. Called by all workers alike.

    Raises ValueError if the workers cannot share the slots evenly, NonFiniteError on a loss or gradient
    that is not finite.
    """
    if task.slots % worker.world:
        raise ValueError(f"{task.slots} slots cannot be shared evenly by {worker.world} workers")
    started = time.monotonic()
    backend: Backend
    if dist.is_available() and dist.is_initialized():
        backend = DeepSpeedBackend(task, worker.world)
    else:
        backend = PlainBackend(task)
    averages = dict(task.average(backend.masters())) if task.average else {}
    snapshots = task.snapshots
    norms = list(task.norms)
    parts = MetricParts(task.metrics_url if worker.rank == 0 else None)

    first = _restore(task, backend, averages, worker)
    parts.drop_beyond(first)
    if snapshots is not None and worker.rank == 0:
        snapshots.start(first)
    checkpoint_steps = max(1, task.checkpoint_images // task.batch_size)
    seconds = dict.fromkeys(("setup", "data", "validation", "snapshots", "checkpoint", "train"), 0.0)
    seconds["setup"] = time.monotonic() - started
    first_step_at = time.time()
    device = next(task.objective.parameters()).device
    sums: dict[str, float] = defaultdict(float)
    counted = 0
    shown = time.monotonic()

    for step in range(first, task.steps):
        found: list[dict[str, Tensor]] = []  # of each slot: its loss and the terms of it
        for slot in range(worker.rank, task.slots, worker.world):
            clock = time.monotonic()
            batch = {name: part.to(device, non_blocking=True) for name, part in task.batch(step, slot).items()}
            seconds["data"] += time.monotonic() - clock
            torch.manual_seed(seed_of("dropout", task.seed, task.phase, step, slot))
            rng = generator("loss", task.seed, task.phase, step, slot, device=device)
            loss, terms = backend.backward(batch, step, rng)
            found.append({"loss": loss, **{name: term.detach() for name, term in terms.items()}})

        # One collective a step: is every worker's loss finite, metrics, batch-norm statistics.
        scalars = torch.stack([value for slot in found for value in slot.values()]).view(len(found), -1).mean(0)
        average_over_workers([scalars, *(s for norm in norms for s in (norm.slot_mean, norm.slot_var))], worker.world)
        values = dict(zip(found[0], scalars.tolist(), strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(f"{task.phase}, step {step}: {', '.join(bad)} not finite; the last checkpoint is kept")
        for norm in norms:
            norm.move_running_statistics()

        rate = task.learning_rate(step)
        values["grad_norm"] = backend.update(rate)
        if not math.isfinite(values["grad_norm"]):
            raise NonFiniteError(f"{task.phase}, step {step}: gradient not finite; the last checkpoint is kept")
        done = step + 1
        for average in averages.values():
            average.update(done)
        if snapshots is not None and done in snapshots.steps:
            clock = time.monotonic()
            for name in snapshots.tracks:
                full = _gathered(backend, averages[name])
                if worker.rank == 0:
                    snapshots.write(done, name, full)
            seconds["snapshots"] += time.monotonic() - clock

        counted += 1
        for name, value in values.items():
            sums[name] += value
        keep = done % checkpoint_steps == 0 and done < task.steps
        validates = task.validation is not None and done in task.validation.steps
        if done % task.log_every == 0 or keep or validates or done == task.steps:
            line = {name: total / counted for name, total in sums.items()}
            if validates:
                clock = time.monotonic()
                line |= _validated(task, backend, worker, step)
                seconds["validation"] += time.monotonic() - clock
            parts.add(step=done, images=done * task.batch_size, learning_rate=rate, **line)
            sums.clear()
            counted = 0
            if worker.rank == 0 and time.monotonic() - shown > 10:
                shown = time.monotonic()
                _show_progress(task, first, done, line["loss"], shown - started - seconds["setup"])
        if keep:
            clock = time.monotonic()
            parts.write(done)
            _save(backend, averages, worker, done)
            seconds["checkpoint"] += time.monotonic() - clock

    parts.write(task.steps)
    seconds["train"] = time.monotonic() - started - seconds["setup"]
    last_step_at = time.time()
    full_averages = {name: _gathered(backend, average) for name, average in averages.items()}
    return Outcome(full_averages, seconds, first_step_at, last_step_at)


def _validated(task: Task, backend: Backend, worker: Worker, step: int) -> dict[str, float]:
    """The metrics of the task's validation; called by all workers. Training goes on as if it had not been."""
    assert task.validation is not None
    device = next(task.objective.parameters()).device
    found: list[dict[str, Tensor]] = []
    task.objective.eval()
    with torch.no_grad():
        for number in range(task.validation.batches):
            for slot in range(worker.rank, task.slots, worker.world):
                batch = {name: part.to(device) for name, part in task.validation.batch(number, slot).items()}
                rng = generator("validation", task.seed, task.phase, number, slot, device=device)
                loss, terms = backend.forward(batch, step, rng)
                found.append({"loss": loss, **terms})
    task.objective.train()
    scalars = torch.stack([value for one in found for value in one.values()]).view(len(found), -1).mean(0)
    average_over_workers([scalars], worker.world)
    return task.validation.summary(dict(zip(found[0], scalars.tolist(), strict=True)))


def _show_progress(task: Task, first: int, done: int, loss: float, seconds: float) -> None:
    left = seconds / (done - first) * (task.steps - done)
    rate = (done - first) * task.batch_size / seconds
    print(
        f"{task.phase}: step {done}/{task.steps}  loss {loss:.4g}  {rate:.0f} images/s  {left:.0f} s left",
        file=sys.stderr,
        flush=True,
    )


def _gathered(backend: Backend, average: Averager) -> dict[str, Tensor]:
    """An average as full named tensors on the CPU; called by all workers."""
    return {name: tensor.cpu().contiguous() for name, tensor in backend.gathered(average.averages).items()}


def _average_file(directory: Path, name: str) -> Path:
    return directory / f"ema-{name}.safetensors"


def _save(backend: Backend, averages: Mapping[str, Averager], worker: Worker, step: int) -> None:
    """A resume checkpoint: weights and moments by the back-end, the EMAs as full named fp32 tensors, the step."""
    with TemporaryDirectory(prefix="tdiff-checkpoint-") as folder:
        directory = Path(folder)
        backend.save(directory)
        for name, average in averages.items():
            full = _gathered(backend, average)
            if worker.rank == 0:
                save_file(full, _average_file(directory, name))
        if worker.rank == 0:
            (directory / "progress.json").write_text(json.dumps({"step": step, "world": worker.world}))
        worker.keep(directory)


def _restore(task: Task, backend: Backend, averages: Mapping[str, Averager], worker: Worker) -> int:
    """Goes back to the worker's checkpoint, if it has one: the number of steps already done."""
    with worker.restored() as directory:
        if directory is None:
            return 0
        progress = json.loads((directory / "progress.json").read_text())
        if progress["world"] != worker.world:
            raise ConfigError(
                f"{task.phase} has a checkpoint of {progress['world']} workers and cannot go on with {worker.world}: "
                f"set workers={progress['world']}."
            )
        backend.load(directory)
        for name, average in averages.items():
            backend.scatter(average.averages, load_file(_average_file(directory, name)))
    step: int = progress["step"]
    return step
