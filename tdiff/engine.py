"""The one training loop, for both stages. It knows no tree and no diffusion.

A stage hands over a `Task`: an objective, its batches, its schedule. The loop, per step:

    for each of this worker's slots: batch -> loss -> backward     (slots s = rank mod workers)
    average over the slots: a finite loss?, metrics, batch-norm statistics; does anybody wish to stop?
    update: clip, learning rate, optimizer, EMAs
    now and then: metrics, snapshots of the EMAs, a resume checkpoint

A global batch is `slots` fixed parts, so what a step computes does not depend on how many workers share
them. State is a function of progress: batches and random draws follow from (seed, phase, step, slot), so a
checkpoint is weights, buffers, optimizer moments, EMAs, the step, and sums for the next line of metrics
(`tdiff.checkpoints`). It is copied at once and written while training goes on, and any number of workers can go on
from it.

Two back-ends with one interface: DeepSpeed (ZeRO, in a process group) and plain PyTorch (one process).
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tdiff.checkpoints import (
    PROGRESS,
    Checkpoints,
    Rollback,
    Writing,
    folder_of,
    read_progress,
    read_track,
    tensors_file,
)
from tdiff.config import Recovery
from tdiff.errors import DataError, NonFiniteError, RolledBack, Stopped
from tdiff.seeds import generator, seed_of
from tdiff.tracking import MetricParts

Batch = dict[str, Tensor]


class Worker(Protocol):
    """This process's place among the workers, and what is asked of it meanwhile."""

    rank: int
    world: int

    def told_to_stop(self) -> bool:
        """Whether training should stop after this step; one worker's wish is enough."""

    def expects(self, seconds: float) -> None:
        """Training will call this again within so many seconds, or this worker hangs."""


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
    checkpoints_url: str | None = None
    """Folder of its resume checkpoints; None: it keeps none."""
    checkpoint_images: int = 500_000
    recovery: Recovery = field(default_factory=Recovery)
    rolls_back: bool = False
    """Whether training goes back to the last checkpoint after a number that is not finite (at most so often as
    `recovery.rollbacks` says).
    """
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

    def masters(self) -> list[Tensor]:
        """The fp32 tensors that this worker's optimizer moves."""

    def moments(self, updates: int) -> dict[str, list[Tensor]]:
        """The optimizer's state by name, in the order of the masters; where there is none yet, zeros after so many
        updates.
        """

    def gathered(self, averages: list[Tensor]) -> dict[str, Tensor]:
        """Averages of the masters as full named tensors; called by all workers."""

    def own(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """What this worker saves of tensors like the masters: its numbers START… of parameter NAME by "START:NAME"."""

    def scatter(self, tensors: list[Tensor], full: dict[str, Tensor]) -> None:
        """Sets tensors like the masters from parameters' names -> all numbers, flat."""


def _trainable(objective: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def _adam(task: Task, parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=0.0, weight_decay=task.weight_decay, fused=True)


def _moments(adam: torch.optim.Adam, moved: Iterable[Tensor], updates: int) -> dict[str, list[Tensor]]:
    """Adam's state of the tensors that it moves, made where it is not there yet."""
    for tensor in moved:
        if not adam.state[tensor]:
            adam.state[tensor] = {
                "step": torch.tensor(float(updates), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
    return {name: [adam.state[tensor][name] for tensor in moved] for name in ("exp_avg", "exp_avg_sq")}


def _whole(names: Iterable[str], tensors: list[Tensor]) -> dict[str, Tensor]:
    """`Backend.own` where every tensor is one parameter's."""
    return {f"0:{name}": tensor.reshape(-1) for name, tensor in zip(names, tensors, strict=True)}


class PlainBackend:
    """One process, no DeepSpeed: for machines with nothing else, and for fast tests."""

    def __init__(self, task: Task):
        self.task = task
        self.parameters = _trainable(task.objective)
        self.optimizer = _adam(task, self.parameters.values())

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
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)  # as DeepSpeed does: every moment counts every update
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.task.clip or math.inf))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def masters(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters.values()]

    def moments(self, updates: int) -> dict[str, list[Tensor]]:
        return _moments(self.optimizer, self.parameters.values(), updates)

    def gathered(self, averages: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.parameters, averages, strict=True))

    def own(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return _whole(self.parameters, tensors)

    def scatter(self, tensors: list[Tensor], full: dict[str, Tensor]) -> None:
        for name, tensor in zip(self.parameters, tensors, strict=True):
            tensor.copy_(full[name].view(tensor.shape))


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
        self.adam = _adam(task, self.parameters.values())  # whose tensors ZeRO exchanges for its partitions
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
            optimizer=self.adam,
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
        """Its partition, or without ZeRO every parameter."""
        if self.task.zero == 0:
            return [p.detach() for p in self.parameters.values()]
        if self.task.zero == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def moments(self, updates: int) -> dict[str, list[Tensor]]:
        moved = self.parameters.values() if self.task.zero == 0 else self.masters()
        return _moments(self.adam, moved, updates)

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

    def own(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        if self.task.zero == 0:
            return _whole(self.parameters, tensors) if dist.get_rank() == 0 else {}
        return {f"{piece.start}:{piece.name}": piece.of_master(tensors) for piece in self._pieces()}

    def scatter(self, tensors: list[Tensor], full: dict[str, Tensor]) -> None:
        if self.task.zero == 0:
            for name, tensor in zip(self.parameters, tensors, strict=True):
                tensor.copy_(full[name].view(tensor.shape))
            return
        for piece in self._pieces():
            piece.of_master(tensors).copy_(piece.of(full[piece.name]))

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


LONG = 60.0
"""Seconds of training that a kill between the last step and the end of the phase may cost: after more, the last step
has a checkpoint too.
"""


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
    """Trains to the end, going on from the newest checkpoint if there is one. Called by all workers alike.

    Raises ValueError if the workers cannot share the slots evenly; NonFiniteError, before the update, on a loss or
    gradient that is not finite, RolledBack where training is to go on from the last checkpoint; Stopped, its checkpoint
    durable, where a worker is told to stop.
    """
    if task.slots % worker.world:
        raise ValueError(f"{task.slots} slots cannot be shared evenly by {worker.world} workers")
    started = time.monotonic()
    worker.expects(task.recovery.first_step_seconds)
    distributed = dist.is_available() and dist.is_initialized()
    saver = Saver(task, worker) if task.checkpoints_url is not None else None
    if saver is not None:
        saver.load_weights()
    backend: Backend = DeepSpeedBackend(task, worker.world) if distributed else PlainBackend(task)
    averages = dict(task.average(backend.masters())) if task.average else {}
    snapshots = task.snapshots
    norms = list(task.norms)
    parts = MetricParts(task.metrics_url if worker.rank == 0 else None)
    progress = Progress() if saver is None else saver.load(backend, averages)

    first = progress.step
    parts.drop_beyond(first)
    if snapshots is not None and worker.rank == 0:
        snapshots.start(first)
    checkpoint_steps = max(1, task.checkpoint_images // task.batch_size)
    seconds = dict.fromkeys(("setup", "data", "validation", "snapshots", "checkpoint", "train"), 0.0)
    seconds["setup"] = time.monotonic() - started
    first_step_at = time.time()
    device = next(task.objective.parameters()).device
    shown = saved = time.monotonic()

    for step in range(first, task.steps):
        found: list[dict[str, Tensor]] = []  # of each slot: its loss and the terms of it
        for slot in range(worker.rank, task.slots, worker.world):
            clock = time.monotonic()
            batch = _on(device, task.batch(step, slot))
            seconds["data"] += time.monotonic() - clock
            loss, terms = backend.backward(batch, step, _draws(task, saver, step, slot, device))
            found.append({"loss": loss, **{name: term.detach() for name, term in terms.items()}})

        # One collective a step: is every worker's loss finite, metrics, wishes, batch-norm statistics.
        scalars = torch.stack([value for slot in found for value in slot.values()]).view(len(found), -1).mean(0)
        bound = LONG if step + 1 == task.steps else 60 * task.recovery.checkpoint_minutes
        late = worker.rank == 0 and time.monotonic() - saved > bound
        writing = (False, False) if saver is None else (saver.writing.busy, saver.writing.failed)
        wishes = scalars.new_tensor((worker.told_to_stop(), late, *writing))
        scalars = torch.cat([scalars, wishes])
        average_over_workers([scalars, *(s for norm in norms for s in (norm.slot_mean, norm.slot_var))], worker.world)
        *means, stop, due, busy, failed = scalars.tolist()
        values = dict(zip(found[0], means, strict=True))
        if not all(map(math.isfinite, means)):
            raise _not_finite(task, worker, saver, step, _blamed_terms(task, worker, found))
        for norm in norms:
            norm.move_running_statistics()

        rate = task.learning_rate(step)
        values["grad_norm"] = backend.update(rate)
        if not math.isfinite(values["grad_norm"]):
            raise _not_finite(task, worker, saver, step, _blamed_gradients(task, worker, saver, step, device))
        done = step + 1
        for average in averages.values():
            average.update(done)
        if snapshots is not None and done in snapshots.steps:
            clock = time.monotonic()
            worker.expects(task.recovery.first_step_seconds)  # storage has bounds of its own
            for name in snapshots.tracks:
                full = _gathered(backend, averages[name])
                if worker.rank == 0:
                    snapshots.write(done, name, full)
            _barrier(task, worker)  # else the others would wait for worker 0 in the next step, whose bound is short
            seconds["snapshots"] += time.monotonic() - clock

        # Lines do not depend on when checkpoints are written, or a run that was killed would have others.
        progress.add(values)
        validates = task.validation is not None and done in task.validation.steps
        if done % task.log_every == 0 or validates or done == task.steps:
            line = progress.means()
            if validates:
                clock = time.monotonic()
                worker.expects(task.recovery.first_step_seconds)
                line |= _validated(task, backend, worker, step)
                seconds["validation"] += time.monotonic() - clock
            parts.add(step=done, images=done * task.batch_size, learning_rate=rate, **line)
            if worker.rank == 0 and time.monotonic() - shown > 10:
                shown = time.monotonic()
                _show_progress(task, first, done, line["loss"], shown - started - seconds["setup"])
        if saver is not None:
            saver.writing.go_on(busy > 0, failed > 0)
            if due > 0 or (done < task.steps and (done % checkpoint_steps == 0 or stop > 0)):
                clock = saved = time.monotonic()
                progress.step = done
                saver.save(backend, averages, progress, parts)
                if stop > 0:
                    saver.settle()
                seconds["checkpoint"] += time.monotonic() - clock
        if done == first + 1 and first > 0 and worker.rank == 0:
            print(f"{task.phase}: goes on from step {first} of {task.steps}", file=sys.stderr, flush=True)
        if stop > 0 and done < task.steps:
            raise Stopped(f"{task.phase} was told to stop after step {done} of {task.steps}")
        worker.expects(task.recovery.step_seconds)

    worker.expects(task.recovery.first_step_seconds)
    if saver is not None:
        clock = time.monotonic()
        saver.settle()
        seconds["checkpoint"] += time.monotonic() - clock
    parts.write(task.steps)
    seconds["train"] = time.monotonic() - started - seconds["setup"]
    last_step_at = time.time()
    full_averages = {name: _gathered(backend, average) for name, average in averages.items()}
    return Outcome(full_averages, seconds, first_step_at, last_step_at)


def _on(device: torch.device, batch: Batch) -> Batch:
    return {name: part.to(device, non_blocking=True) for name, part in batch.items()}


def _draws(task: Task, saver: Saver | None, step: int, slot: int, device: torch.device) -> torch.Generator:
    """Seeds dropout; the generator of the loss's own draws. Both follow from (seed, phase, step, slot), and from how
    often the draws of the step have been renewed (`renewals`).
    """
    renewed = renewals(saver.rollbacks, step) if saver is not None else 0
    place: list[int | str] = [task.seed, task.phase, step, slot, *([renewed] if renewed else [])]
    torch.manual_seed(seed_of("dropout", *place))
    return generator("loss", *place, device=device)


# --- what is not finite ------------------------------------------------------------------------------


def renewals(rollbacks: Sequence[Rollback], step: int) -> int:
    """How often the random draws of a step have been renewed.

    After the first time that a step was not finite, the same draws come again, so that a fault of the machine leaves no
    trace; after every further time, from the checkpoint on, others do.
    """
    seen: set[int] = set()
    count = 0
    for rollback in rollbacks:
        count += rollback.step in seen and rollback.back_to <= step
        seen.add(rollback.step)
    return count


def _not_finite(task: Task, worker: Worker, saver: Saver | None, step: int, what: str) -> NonFiniteError:
    """The error of a step whose loss or gradient is not finite; called by all workers. Notes down where training is to
    go back to, if it may.
    """
    said = f"{task.phase}, step {step}: {what} not finite"
    if saver is None:
        return NonFiniteError(f"{said}.")
    saver.settle()
    tried, allowed = len(saver.rollbacks), task.recovery.rollbacks if task.rolls_back else 0
    if tried >= allowed:
        after = f" after {tried} rollbacks" if tried else ""
        return NonFiniteError(f"{said}{after}; the last checkpoint is kept.")
    newest = saver.checkpoints.newest()
    rollback = Rollback(step, newest.step if newest is not None else 0)
    if worker.rank == 0:
        saver.checkpoints.add_rollback(rollback)
    _barrier(task, worker)  # nobody leaves before that is written
    return RolledBack(f"{said}; going back to step {rollback.back_to}, rollback {tried + 1} of {allowed}")


def _barrier(task: Task, worker: Worker) -> None:
    average_over_workers([torch.zeros(1, device=next(task.objective.parameters()).device)], worker.world)


def _blamed_terms(task: Task, worker: Worker, found: list[dict[str, Tensor]]) -> str:
    """Which terms are not finite, and whose."""
    slots = range(worker.rank, task.slots, worker.world)
    bad = {slot: [not bool(value.isfinite()) for value in of.values()] for slot, of in zip(slots, found, strict=True)}
    return _blame(task, worker, list(found[0]), bad) or "the sum over the workers"


def _blamed_gradients(task: Task, worker: Worker, saver: Saver | None, step: int, device: torch.device) -> str:
    """Which parameters' gradients are not finite, and whose: computed once more, on weights that have not moved."""
    if task.zero == 3:
        return "gradient"  # outside the engine nobody has whole parameters
    parameters = _trainable(task.objective)
    bad: dict[int, list[bool]] = {}
    for slot in range(worker.rank, task.slots, worker.world):
        batch = _on(device, task.batch(step, slot))
        with torch.autocast(device.type, torch.bfloat16, enabled=task.autocast):
            loss, _ = task.objective(batch, step, _draws(task, saver, step, slot, device))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        bad[slot] = [gradient is not None and not bool(gradient.isfinite().all()) for gradient in found]
    named = _blame(task, worker, [f"gradient of {name}" for name in parameters], bad)
    return named or "gradient, summed over the workers,"


def _blame(task: Task, worker: Worker, names: list[str], bad: dict[int, list[bool]]) -> str:
    """`a, b and 3 more of worker 1 (slot 3)`, from what each worker knows of its own slots; empty if nothing is bad."""
    flags = torch.zeros(task.slots, len(names), device=next(task.objective.parameters()).device)
    for slot, row in bad.items():
        flags[slot] = torch.tensor(row, device=flags.device)
    average_over_workers([flags], worker.world)
    told = []
    for slot in range(task.slots):
        wrong = [name for name, flag in zip(names, flags[slot].tolist(), strict=True) if flag]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            told.append(f"{', '.join(wrong[:3])}{more} of worker {slot % worker.world} (slot {slot})")
    return "; ".join(told)


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


# --- resume checkpoints ------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far training is: steps done, and sums of the values that no metric line has told yet."""

    step: int = 0
    counted: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        self.counted += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: total / self.counted for name, total in self.sums.items()}
        self.sums, self.counted = {}, 0
        return means


class Saver:
    """Writes and reads a task's checkpoints; all workers call it alike."""

    def __init__(self, task: Task, worker: Worker):
        assert task.checkpoints_url is not None
        self.task, self.worker = task, worker
        self.checkpoints = Checkpoints(task.checkpoints_url, task.recovery.checkpoints)
        self.writing = Writing(self.checkpoints, worker.rank == 0)
        agreed: list[Any] = [None, None, []]
        if worker.rank == 0:
            self.checkpoints.tidy()
            newest = self.checkpoints.newest()
            agreed = [newest and newest.url, secrets.token_hex(4), self.checkpoints.rollbacks()]
        if worker.world > 1:
            dist.broadcast_object_list(agreed, src=0)
        self.url: str | None = agreed[0]
        """Of the checkpoint to go on from."""
        self.attempt: str = agreed[1]
        self.rollbacks: list[Rollback] = agreed[2]

    def load_weights(self) -> None:
        """Sets parameters and buffers, before a back-end takes them over."""
        if self.url is None:
            return
        saved = read_track(self.url, "weights") | read_track(self.url, "buffers")
        here = {**_trainable(self.task.objective), **_buffers(self.task.objective)}
        if saved.keys() != here.keys():
            name = min(saved.keys() ^ here.keys())
            raise DataError(f"{self.url} is of another network than {self.task.phase}'s: {name} is in one of them")
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(saved[name].view(tensor.shape))

    def load(self, backend: Backend, averages: Mapping[str, Averager]) -> Progress:
        """Sets the optimizer's moments and the averages."""
        if self.url is None:
            return Progress()
        progress = Progress(**read_progress(self.url))
        for track, tensors in self._tracks(backend, averages, progress.step).items():
            backend.scatter(tensors, read_track(self.url, track))
        return progress

    @staticmethod
    def _tracks(backend: Backend, averages: Mapping[str, Averager], updates: int) -> dict[str, list[Tensor]]:
        of_averages = {f"ema-{name}": average.averages for name, average in averages.items()}
        return backend.moments(updates) | of_averages

    def save(self, backend: Backend, averages: Mapping[str, Averager], progress: Progress, parts: MetricParts) -> None:
        """Copies the state, and begins to write the copy once the last one is written."""
        self.settle()
        tracks = {"weights": backend.masters(), **self._tracks(backend, averages, progress.step)}
        own = {track: backend.own(tensors) for track, tensors in tracks.items()}
        files = {}
        if self.worker.rank == 0:
            buffers = _buffers(self.task.objective)
            own["buffers"] = _whole(buffers, list(buffers.values()))
            files[PROGRESS] = json.dumps(asdict(progress)).encode()
        files |= dict(tensors_file(track, self.worker.rank, held) for track, held in own.items() if held)
        listed = {file: len(content) for file, content in files.items()}
        if self.worker.world > 1:
            of_all: list[Any] = [None] * self.worker.world
            dist.all_gather_object(of_all, listed)
            listed = {file: size for of_one in of_all for file, size in of_one.items()}
        name = folder_of(progress.step, self.attempt)
        self.writing.begin(progress.step, name, files, listed, parts.writer(progress.step))

    def settle(self) -> None:
        """Waits until nothing is being written, by anybody."""
        device = next(self.task.objective.parameters()).device
        while self.writing.of is not None:
            # Storage has bounds of its own: a worker that waits for a slow one does not hang.
            self.worker.expects(self.task.recovery.first_step_seconds)
            self.writing.wait()
            failed = torch.tensor([float(self.writing.failed)], device=device)
            average_over_workers([failed], self.worker.world)
            self.writing.go_on(False, float(failed) > 0)


def _buffers(objective: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the network's state."""
    parameters = {name for name, _ in objective.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in objective.state_dict().items() if name not in parameters}
