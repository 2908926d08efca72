"""Ray: connect, train on workers, map over actors. The only module that knows it."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by Ray when it is imported. The usage report needs the internet.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray Train would print what workers print a second time.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
if not os.environ.get("RAY_ADDRESS"):
    # Nobody preempts or scrapes a cluster that lives within this process: 2 of 10 s of every job's start and end.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Ray's default for a new local cluster, which listens on every interface.
    early = "ray" in sys.modules and "RAY_AUTH_MODE" not in os.environ
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder

    if early:
        # Imported before this module, Ray has kept that there is no token, and could not reach a cluster of its own.
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

        AuthenticationTokenLoader.instance().reset_cache()

import ray
import ray.exceptions

from tdiff.errors import ConfigError, Problem, WorkersLostError


def default_workers(workers: int | None) -> int:
    """How many workers are wanted: as asked for, or 2, or as many as this machine's CPUs if it has fewer.

    Raises ConfigError if more are asked for than this machine, where no cluster is named, has CPUs.
    """
    if os.environ.get("RAY_ADDRESS"):
        return workers or 2
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None and workers > cpus:
        raise ConfigError(f"workers={workers} is more than this machine's {cpus} CPUs: take workers={cpus}.")
    return workers or min(2, cpus)


def connect(workers: int) -> None:
    """Joins the cluster that RAY_ADDRESS names (as in a Ray job), or starts a local one, unless that is done.

    Raises ConfigError if it cannot be joined, or has fewer CPUs than workers.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else True,  # without it Ray Train's cleaner warns without end
                logging_level=logging.WARNING,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            remedy = "start that cluster, or unset RAY_ADDRESS" if address else "see the reason"
            raise ConfigError(f"RAY_ADDRESS={address or 'local'} cannot be reached ({reason}): {remedy}.") from error
    available = int(ray.cluster_resources().get("CPU", 0))
    if workers > available:
        raise ConfigError(f"workers={workers} is more than the cluster's {available} CPUs: take workers={available}.")


def gpus() -> int:
    """GPUs of the cluster that is connected: where there are any, every worker gets one."""
    return int(ray.cluster_resources().get("GPU", 0))


def at_once(workers: int) -> int:
    """How many of the wanted workers the connected cluster can run at once."""
    return min(workers, gpus()) if gpus() else workers


def workers_for(slots: int, at_most: int) -> int:
    """The largest divisor of `slots` that is not above `at_most`."""
    return max(w for w in range(1, min(slots, at_most) + 1) if slots % w == 0)


def disconnect() -> None:
    """Leaves the cluster; a local one ends."""
    if ray.is_initialized():
        ray.shutdown()


@dataclass
class TrainWorker:
    """A Ray Train worker, as the loop sees it (`tdiff.engine.Worker`)."""

    rank: int
    world: int

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        from ray import train

        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def keep(self, directory: Path) -> None:
        from ray import train

        train.report({}, checkpoint=train.Checkpoint.from_directory(str(directory)))
        # report() returns before the controller has registered the checkpoint: wait, so that it counts.
        train.get_all_reported_checkpoints()


def _one_thread() -> None:
    """One thread a worker: sums, and so results, must not depend on a machine's cores or its OMP_NUM_THREADS."""
    import torch

    torch.set_num_threads(1)


def fit(
    function: Callable[[Any, TrainWorker], None],
    argument: Any,
    workers: int,
    url: str,
    say: Callable[[str], None] = print,
    retries: int = 3,
) -> None:
    """Runs `function(argument, worker)` as one Ray Train job of `workers`, with its resume checkpoints in `url`.

    A job started again under the same url goes on from its last checkpoint; so it is, `retries` times at most, when
    a worker dies: then WorkersLostError. An error that would come again (of data, of numbers) is raised at once.
    """
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    def loop(config: dict[str, Any]) -> None:
        logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells every checkpoint on the root logger
        _one_thread()
        context = train.get_context()
        config["function"](config["argument"], TrainWorker(context.get_world_rank(), context.get_world_size()))

    for attempt in range(retries + 1):
        trainer = TorchTrainer(
            loop,
            train_loop_config={"function": function, "argument": argument},
            scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=gpus() > 0),
            run_config=train.RunConfig(
                name="checkpoints",
                storage_path=url,
                checkpoint_config=train.CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig(log_level="CRITICAL"),  # its failures are raised here
            ),
        )
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            failures = list(getattr(error, "worker_failures", {}).values())
            for failure in failures:
                cause = getattr(failure, "_base_exc", failure)
                if isinstance(cause, Problem | ValueError | ArithmeticError):
                    cause.add_note(str(failure))  # the worker's traceback
                    raise cause from error
            reason = " ".join(str(failures[0] if failures else error).split())[-300:]
            if attempt == retries:
                raise WorkersLostError(f"workers failed {retries + 1} times in {url}, at last: {reason}") from error
            say(f"a worker failed ({reason}); going on from the last checkpoint, try {attempt + 1} of {retries}")


def map_on_actors(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    workers: int,
    attempts: int = 3,
    use_gpu: bool = True,
) -> Iterator[tuple[int, Any]]:
    """Yields (index of the task, function(*task)) as they finish, on `workers` actors (one GPU each, if there are any
    and it can use them).

    A task whose actor dies is given to a new one, `attempts` times at most; an error of the function itself is
    raised at once. Tasks must be idempotent.
    """

    class Caller:
        def call(self, task: tuple[Any, ...]) -> Any:
            _one_thread()
            return function(*task)

    new_actor = ray.remote(num_cpus=1, num_gpus=1 if use_gpu and gpus() else 0, max_restarts=0)(Caller).remote

    waiting = list(range(len(tasks)))[::-1]
    tries = dict.fromkeys(waiting, 0)
    running: dict[Any, tuple[int, Any]] = {}

    def start(actor: Any) -> None:
        if waiting:
            index = waiting.pop()
            tries[index] += 1
            running[actor.call.remote(tasks[index])] = (index, actor)

    for _ in range(min(workers, len(tasks))):
        start(new_actor())
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        index, actor = running.pop(ready)
        try:
            result = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            if tries[index] >= attempts:
                reason = " ".join(str(error).split())[:300]
                raise WorkersLostError(f"task {index} lost its worker {attempts} times: {reason}") from error
            waiting.append(index)
            actor = new_actor()
            start(actor)
            continue
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from error
        yield index, result
        start(actor)
