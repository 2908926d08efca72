"""Ray: connect, train on workers, map over actors. The only module that knows it."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

# Read by Ray when it is imported. The usage report needs the internet.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray Train would print what workers print a second time.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
# `TrainWorker` asks itself whether its node is told to go: the watcher is 2 of 10 s of every job's start and end.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
if not os.environ.get("RAY_ADDRESS"):
    # Nobody scrapes a cluster that lives within this process.
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Ray's default for a new local cluster, which listens on every interface.
    early = sys.modules.get("ray")
    if early is None or not early.is_initialized():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    if early is not None and not early.is_initialized():
        # Imported before this module, Ray has kept mode and token as they were then, and could not reach a cluster of
        # its own.
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

import ray
import ray.exceptions

from tdiff import storage
from tdiff.checkpoints import Checkpoints
from tdiff.config import Recovery
from tdiff.errors import ConfigError, Problem, RolledBack, Stopped, WorkersLostError
from tdiff.nodes import NodeSampler

Say = Callable[[str], None]

API_SERVER = "RAY_API_SERVER_ADDRESS"
"""Without it, whoever asks the cluster of this process about its state finds two where another one runs beside it: then
what a dead controller had reserved would never be free again.
"""


class Crew(NamedTuple):
    """How many workers are wanted: at least, and at most."""

    least: int
    most: int


def crew_of(workers: int | tuple[int, int] | None) -> Crew:
    """How many workers are wanted: as asked for, or 2, or as many as this machine's CPUs if it has fewer.

    Raises ConfigError if more are asked for than this machine, where no cluster is named, has CPUs.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if os.environ.get("RAY_ADDRESS"):
        cpus = sys.maxsize  # that is the cluster's business
    least, most = workers if isinstance(workers, tuple) else [workers or min(2, cpus)] * 2
    if least > cpus:
        raise ConfigError(f"workers={least} is more than this machine's {cpus} CPUs: take workers={cpus}.")
    return Crew(least, min(most, cpus))


def default_workers(workers: int | tuple[int, int] | None) -> int:
    """As many as `crew_of` wants, for work that any number may share."""
    return crew_of(workers).most


def connect(workers: int) -> None:
    """Joins the cluster that RAY_ADDRESS names (as in a Ray job), or starts a local one, unless that is done.

    Raises ConfigError if it cannot be joined, or has fewer CPUs than workers.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        on_sigterm = signal.getsignal(signal.SIGTERM)  # a local cluster would take it to itself
        try:
            context = ray.init(
                address=address or "local",
                include_dashboard=None if address else True,  # Ray Train's cleaner asks it
                logging_level=logging.WARNING,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            remedy = "start that cluster, or unset RAY_ADDRESS" if address else "see the reason"
            raise ConfigError(f"RAY_ADDRESS={address or 'local'} cannot be reached ({reason}): {remedy}.") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        if not address:
            os.environ[API_SERVER] = f"http://{context.dashboard_url}"
    uses_gpus()
    available = int(ray.cluster_resources().get("CPU", 0))
    if workers > available:
        raise ConfigError(f"workers={workers} is more than the cluster's {available} CPUs: take workers={available}.")


def gpus() -> int:
    """GPUs that the cluster that is connected has now."""
    return int(ray.cluster_resources().get("GPU", 0))


_with_gpus = False


def uses_gpus() -> bool:
    """Whether every worker gets a GPU: where the cluster has had any since this process joined it. Lost ones are waited
    for, or a run would go on on CPUs when its last GPU node is gone.
    """
    global _with_gpus
    _with_gpus = _with_gpus or gpus() > 0
    return _with_gpus


def at_once(workers: int) -> int:
    """How many of the wanted workers the connected cluster can run at once."""
    return min(workers, max(1, gpus())) if uses_gpus() else workers


def workers_for(slots: int, at_most: int) -> int:
    """The largest divisor of `slots` that is not above `at_most`."""
    return sizes(slots, Crew(1, at_most))[-1]


def disconnect() -> None:
    """Leaves the cluster; a local one ends."""
    global _with_gpus
    _with_gpus = False
    if ray.is_initialized():
        ray.shutdown()
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.pop(API_SERVER, None)


class NodeSamplers:
    """A `tdiff.nodes.NodeSampler` on every node of the connected cluster, in an actor that takes no CPU."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}  # by Ray's id of the node
        self._names: dict[str, str] = {}

    def take(self, patience: float = 10.0) -> list[tuple[str, float, dict[str, float]]]:
        """What nodes have told since the last call: (node, Unix time in seconds, values by name).

        A node that has come gets its sampler, so the first call finds nothing; one that has gone is forgotten.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in ray.nodes():
            key, name = node["NodeID"], node["NodeManagerHostname"]
            if node["Alive"] and key not in self._actors:
                self._names[key] = name if name not in self._names.values() else f"{name}-{key[:6]}"
                here = NodeAffinitySchedulingStrategy(key, soft=False)
                options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
                self._actors[key] = ray.remote(**options)(NodeSampler).remote()
        asked = {key: actor.take.remote() for key, actor in self._actors.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=patience)
        found = []
        for key, answer in asked.items():
            try:
                found += [(self._names[key], at, values) for at, values in ray.get(answer, timeout=0)]
            except ray.exceptions.GetTimeoutError:
                continue  # still starting, or slow: what it took for this call is lost
            except ray.exceptions.RayError:  # its node is gone, or went before it started
                del self._actors[key], self._names[key]
        return found


# --- training ----------------------------------------------------------------------------------------


class TrainWorker:
    """A Ray Train worker, as the loop sees it (`tdiff.engine.Worker`).

    It asks in the background whether it should stop, and ends itself where the loop hangs: then Ray tells the driver.
    """

    def __init__(self, rank: int, world: int, key: str):
        """key: the driver's wish that training stops, in the cluster's key-value store."""
        self.rank, self.world = rank, world
        self._key = key
        self._node = ray.get_runtime_context().get_node_id()
        self._stop, self._asked = threading.Event(), threading.Event()
        self._deadline = math.inf
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def told_to_stop(self) -> bool:
        self._asked.set()
        return self._stop.is_set()

    def expects(self, seconds: float) -> None:
        # Storage may be waited for for longer than usual.
        self._deadline = time.monotonic() + seconds + max(0.0, storage.patience() - storage.PATIENCE)

    def _listen(self) -> None:
        told = self.rank > 0
        while not self._stop.is_set():
            time.sleep(HEARTBEAT)
            try:
                if not told and self._asked.is_set():
                    _put(self._key + BEGUN)
                    told = True
                if (self.rank == 0 and _there(self._key)) or self._node in _draining():
                    self._stop.set()
            except Exception as error:  # whatever Ray's client may raise while the cluster's head is away
                print(f"worker {self.rank} cannot ask whether to stop: {error}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            time.sleep(min(left, HEARTBEAT))
        print(f"worker {self.rank} hangs: no step for too long, so it ends", file=sys.stderr, flush=True)
        os._exit(1)


HEARTBEAT = 1.0
"""Seconds between two looks at what is asked of a worker."""

PROGRESS = 10.0
"""Seconds between two lines of progress."""

GROWTH = 30.0
"""Seconds for which a cluster must have had room for more workers before training is stopped to take them on."""

SETTLING = 10.0
"""Seconds for which workers that have ended may still take their place in the cluster."""

_stopping = False
"""Whether this process was told to stop (SIGTERM) while its workers trained."""


def check_stop() -> None:
    """Raises Stopped, once, if this process was told to stop while workers trained, though they came to their end."""
    global _stopping
    if _stopping:
        _stopping = False
        raise Stopped("told to stop by SIGTERM; the same command goes on from the last checkpoint.")


BEGUN = "-begun"
"""Ending of the key that says that workers listen to the wish of that key: from the end of their first step on."""


def _put(key: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, b"1", overwrite=True)


def _there(key: str) -> bool:
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(key) is not None


def _draining() -> Collection[str]:
    """Ids of the nodes that are told to go, as Kubernetes and clouds do before they take one."""
    from ray._private.state import state

    draining: Collection[str] = state.get_draining_nodes()
    return draining


def _room() -> int:
    """How many workers the cluster has room for, were nobody else in it: one a GPU, or a CPU where there is none."""
    draining = _draining()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    kind = "GPU" if uses_gpus() else "CPU"
    return int(sum(node.get(kind, 0) for node in nodes))


def _free() -> int:
    """How many further workers the cluster has room for, beside all that runs there now."""
    from ray._private.state import available_resources_per_node

    draining, kind = _draining(), "GPU" if uses_gpus() else "CPU"
    return sum(int(free.get(kind, 0)) for node, free in available_resources_per_node().items() if node not in draining)


def sizes(slots: int, crew: Crew) -> list[int]:
    """The numbers of workers that share so many slots evenly, as far as wanted, rising; at least one number."""
    divisors = [w for w in range(1, min(slots, crew.most) + 1) if slots % w == 0]
    return [w for w in divisors if w >= crew.least] or divisors[-1:]


def _size(slots: int, crew: Crew, say: Say) -> int:
    """The most of these workers that there is room for, waiting until there is."""
    wanted = sizes(slots, crew)
    if len(wanted) == 1:
        return wanted[0]
    began, told = time.monotonic(), False
    while True:
        room, free = _room(), _free()
        fitting = [w for w in wanted if w <= free]
        # Workers that have just ended may still count.
        settled = time.monotonic() - began > SETTLING or free >= min(room, wanted[-1])
        if fitting and settled:
            return fitting[-1]
        if settled and not told:
            say(f"waiting for {wanted[0]} workers: the cluster has room for {free}")
            told = True
        time.sleep(HEARTBEAT)


@contextmanager
def _asked_for(wanted: list[int]) -> Iterator[None]:
    """Asks the autoscaler of a standing cluster for the most of these workers, if there may be fewer, until the end.

    What nobody takes back it keeps for good, idle or not.
    """
    if len(wanted) == 1 or not os.environ.get("RAY_ADDRESS"):
        yield
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"GPU" if uses_gpus() else "CPU": 1}] * wanted[-1])
    try:
        yield
    finally:
        try:
            request_resources(bundles=[])
        except Exception as error:  # the cluster may be gone: then what ended the training tells
            print(f"{type(error).__name__} beside training: {error}", file=sys.stderr, flush=True)


class _Watching:
    """Beside a training in the driver: hands on the wish to stop, and takes on more workers where there is room."""

    def __init__(self, key: str, more: Collection[int], meanwhile: Callable[[], None]):
        """more: numbers of further workers that would be welcome."""
        self.grows = False
        self._key, self._more, self._meanwhile = key, more, meanwhile
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watching:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        looked, room, more = time.monotonic(), False, self._more
        while not self._over.wait(HEARTBEAT / 2):
            try:
                if _stopping:
                    _put(self._key)
                    if not _there(self._key + BEGUN):  # no step is lost: nobody is waited for
                        os.kill(os.getpid(), signal.SIGTERM)
                    return
                if time.monotonic() - looked > GROWTH:
                    looked = time.monotonic()
                    before, room = room, bool(more) and min(more) <= _free()
                    if before and room:  # twice in a row: a node that has just come is often not the last one
                        _put(self._key)
                        self.grows, more = True, ()
                    self._meanwhile()
            except Exception as error:  # the cluster may be gone: then the training's own end tells
                print(f"{type(error).__name__} beside training: {error}", file=sys.stderr, flush=True)


@contextmanager
def _sigterm_waits() -> Iterator[None]:
    """SIGTERM lets workers that train write a checkpoint first; a second one does not wait."""

    def handler(signum: int, frame: Any) -> None:
        global _stopping
        if _stopping:
            raise KeyboardInterrupt  # the one exception for which Ray's `get` ends
        _stopping = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except KeyboardInterrupt:
        check_stop()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(failure: BaseException) -> str:
    """Why a process is gone, without Ray's page of advice."""
    text = " ".join(str(failure).split())
    found = re.search(r"Worker exit detail: (.*?)(?= There are some potential| Some common causes|$)", text)
    node = re.search(r"hostname='([^']+)'", text)
    told = found[1] if found else text.partition(" Worker info: ")[0]
    return told[:300] + (f" It was on node {node[1]}." if node else "")


def _reserved() -> set[str]:
    """Ids of the placement groups that this process and its actors have in the cluster."""
    from ray.util.placement_group import placement_group_table

    ours = ray.get_runtime_context().get_job_id()  # with which the ids of all that this job makes end
    return {key for key, group in placement_group_table().items() if key.endswith(ours) and group["state"] != "REMOVED"}


def _give_up_room(before: set[str]) -> None:
    """Removes what has been reserved in the cluster since then, for workers that are gone.

    Ray Train forgets a placement group whose worker dies just as its function starts, and whoever comes next would wait
    for that room for ever.
    """
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    try:
        for key in _reserved() - before:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))
    except Exception as error:  # the cluster may be gone: then the next attempt tells
        print(f"{type(error).__name__} beside training: {error}", file=sys.stderr, flush=True)


def _steps_kept(checkpoints_url: str) -> int:
    newest = Checkpoints(checkpoints_url).newest()
    return 0 if newest is None else newest.step


def _one_thread() -> None:
    """One thread a worker: sums, and so results, must not depend on a machine's cores or its OMP_NUM_THREADS."""
    import torch

    torch.set_num_threads(1)


def _reach_other_nodes() -> None:
    """Lets gloo use the network on which Ray reaches this node, unless GLOO_SOCKET_IFNAME names one.

    gloo itself takes the address of the host's name, which is 127.0.1.1 on an ordinary Debian machine.
    """
    import psutil

    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == here for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _torch_config() -> Any:
    """Ray Train's process group, on a network that reaches the other nodes."""
    from ray.train.torch import TorchConfig

    backend: Any = TorchConfig().backend_cls

    class Backend(backend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_reach_other_nodes)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config()


def fit(
    function: Callable[[Any, TrainWorker], None],
    argument: Any,
    crew: Crew,
    slots: int,
    checkpoints_url: str,
    recovery: Recovery,
    say: Say = print,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Runs `function(argument, worker)` as a Ray Train job, on as many of the crew as share the slots evenly.

    meanwhile: called now and then, in a thread, while it trains.

    Begun again, the function goes on from its newest checkpoint in `checkpoints_url`. So it is where workers, their
    controller or their node are lost, `recovery.retries` times in a row without a newer checkpoint: then
    WorkersLostError; where the numbers say so (RolledBack); where a node is told to go, or others have come. An error
    that would come again (of data, of settings) is raised at once, and Stopped where this process gets SIGTERM.
    """
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    def loop(config: dict[str, Any]) -> None:
        logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells much on the root logger
        _one_thread()
        context = train.get_context()
        worker = TrainWorker(context.get_world_rank(), context.get_world_size(), config["key"])
        worker.expects(recovery.first_step_seconds)
        config["function"](config["argument"], worker)
        worker.expects(math.inf)  # the others may be still at work

    ENV_VARS_TO_PROPAGATE.add(API_SERVER)
    # A process that does not answer is one that hangs.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(recovery.step_seconds))
    lost, done = 0, _steps_kept(checkpoints_url)
    before = _reserved()
    with _asked_for(sizes(slots, crew)):
        while True:
            workers = _size(slots, crew, say)
            key = f"tdiff-stop-{secrets.token_hex(8)}"
            with (
                tempfile.TemporaryDirectory(prefix="tdiff-train-") as folder,
                _Watching(key, [w - workers for w in sizes(slots, crew) if w > workers], meanwhile) as watching,
                _sigterm_waits(),
            ):
                trainer = TorchTrainer(
                    loop,
                    train_loop_config={"function": function, "argument": argument, "key": key},
                    torch_config=_torch_config(),
                    scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=uses_gpus()),
                    run_config=train.RunConfig(
                        name="train",
                        storage_path=folder,  # of what Ray Train keeps itself: our checkpoints are none of it
                        # By itself it would begin again with as many workers, for ever and without a word, where they
                        # find no room or are lost while they start, or are lost with a node that was told to go.
                        failure_config=train.FailureConfig(controller_failure_limit=0, max_preemption_failures=0),
                        logging_config=LoggingConfig(log_level="CRITICAL"),  # its failures are raised here
                    ),
                )
                # Ray Train's own would end this process by sys.exit; Python's ends `fit` by KeyboardInterrupt.
                trainer._register_sigint_handler = lambda controller: None
                try:
                    trainer.fit()
                    return
                except (TrainingFailedError, ray.exceptions.RayError) as error:  # the latter: its controller died
                    failure = error.with_traceback(None)  # whose frames would keep a controller alive
                except KeyboardInterrupt:
                    _give_up_room(before)  # which ends the workers, though this process may live on
                    raise
            _give_up_room(before)
            causes = [getattr(f, "_base_exc", f) for f in getattr(failure, "worker_failures", {}).values()]
            cause = next((c for c in causes if isinstance(c, Problem | ValueError | ArithmeticError)), None)
            newest = _steps_kept(checkpoints_url)
            if newest > done:
                lost = 0
            if isinstance(cause, Stopped):
                check_stop()
                why = "there is room for more workers" if watching.grows else "a node is told to go"
                say(f"{why}; going on from step {newest}")
            elif isinstance(cause, RolledBack):
                check_stop()
                say(str(cause))
            elif isinstance(getattr(failure, "controller_failure", None), WorkerGroupStartupTimeoutError):
                check_stop()
                say(f"there is no room for {workers} workers yet: still waiting")
            elif cause is not None:
                cause.add_note(str(failure))  # the worker's traceback
                raise cause from failure
            else:
                check_stop()
                lost += 1
                reason = _reason(causes[0] if causes else failure)
                if lost > recovery.retries:
                    raise WorkersLostError(
                        f"workers failed {lost} times in a row after step {newest}, at last: {reason}"
                    ) from failure
                say(f"a worker failed ({reason}); going on from step {newest}, try {lost} of {recovery.retries}")
            done = newest


def map_on_actors(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    workers: int,
    attempts: int = 3,
    use_gpu: bool = True,
    what: str = "",
) -> Iterator[tuple[int, Any]]:
    """Yields (index of the task, function(*task)) as they finish, on `workers` actors (one GPU each, if there are any
    and it can use them).

    what: the work's name, under which its progress and the seconds left are told now and then.

    A task whose actor dies is given to a new one, `attempts` times at most; an error of the function itself is
    raised at once. Tasks must be idempotent.
    """

    class Caller:
        def call(self, task: tuple[Any, ...]) -> Any:
            _one_thread()
            return function(*task)

    new_actor = ray.remote(num_cpus=1, num_gpus=1 if use_gpu and uses_gpus() else 0, max_restarts=0)(Caller).remote

    waiting = list(range(len(tasks)))[::-1]
    tries = dict.fromkeys(waiting, 0)
    running: dict[Any, tuple[int, Any]] = {}

    def start(actor: Any) -> None:
        if waiting:
            index = waiting.pop()
            tries[index] += 1
            running[actor.call.remote(tasks[index])] = (index, actor)

    finished = 0
    started = told = time.monotonic()
    for _ in range(min(workers, len(tasks))):
        start(new_actor())
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        index, actor = running.pop(ready)
        try:
            result = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from error
        except ray.exceptions.RayError as error:  # it died, of too little memory too, or its answer with its node
            if tries[index] >= attempts:
                reason = " ".join(str(error).split())[:300]
                raise WorkersLostError(f"task {index} lost its worker {attempts} times: {reason}") from error
            waiting.append(index)
            actor = new_actor()
            start(actor)
            del actor
            continue
        finished += 1
        if what and time.monotonic() - told > PROGRESS and finished < len(tasks):
            told = time.monotonic()
            left = (told - started) / finished * (len(tasks) - finished)
            print(f"{what}: {finished}/{len(tasks)} parts  {left:.0f} s left", file=sys.stderr, flush=True)
        yield index, result
        start(actor)
        del actor  # an idle one gives its room to those that wait for some
