"""A real Ray cluster of several nodes on this machine: each a network, a process table and a host name of its own.

    client (the switch) --- bridge 10.99.0.254
                              |-- 10.99.0.1  node 0: the head, with the dashboard, without CPUs for work
                              |-- 10.99.0.2  node 1
                              |-- ...

A node's namespaces hang on one process, which dies with the test process, however that ends, and takes every process,
address and mount of the node with it: nothing has a name that could be left behind. All nodes see the same files,
except that each has its own /tmp/ray, /dev/shm and /etc/hosts.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import servers

NETWORK = "10.99.0."
CLIENT = NETWORK + "254"
TOOLS = ("unshare", "nsenter", "ip", "mount", "bash")
# Before Ray is started in its namespaces a node waits for its cable.
BOOT = """
mount --bind "$1/ray" /tmp/ray && mount -t tmpfs -o size=1g tmpfs /dev/shm && mount --bind "$1/hosts" /etc/hosts || exit
hostname "$2" && ip link set lo up || exit
echo ready
read -r _
shift 2
"$@" >>"$LOG" 2>&1
exit
"""

# How many nodes the cluster counts as alive, asked from the outside.
ALIVE = """
import json, os, urllib.request
headers = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
request = urllib.request.Request(os.environ["RAY_ADDRESS"] + "/api/v0/nodes", headers=headers)
answer = json.load(urllib.request.urlopen(request, timeout=10))
print(sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"]))
"""


def why_not() -> str | None:
    """Why this machine cannot make nodes; None if it can."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed (iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "ip", "link", "add", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else f"network namespaces need root: {tried.stderr.strip()}"


def _ip(pid: int | None, *arguments: str) -> None:
    """`ip` in the network of a process, or in this one's."""
    where = [] if pid is None else ["nsenter", "--net", "--target", str(pid)]
    subprocess.run([*where, "ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Job:
    """A program that talks to the cluster and what it prints, such as `ray job submit`, which ends with its job."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises TimeoutError with its last lines if it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{self.name} takes longer than {seconds} s:\n{self.output[-3000:]}") from error

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Node:
    """One machine: its place in the network, and the process on which its namespaces hang."""

    number: int
    folder: Path
    process: subprocess.Popen[str]
    network: str
    """What /proc/PID/ns/net leads to, for its processes."""

    @property
    def address(self) -> str:
        return f"{NETWORK}{self.number + 1}"

    def processes(self) -> list[str]:
        """Titles of the processes that live on it."""
        titles = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                if str((folder / "ns" / "net").readlink()) == self.network:
                    titles.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return titles

    def works(self) -> bool:
        """Whether a worker of Ray Train runs on it."""
        return any(title.startswith("ray::RayTrainWorker") for title in self.processes())


@dataclass
class Nodes:
    """A Ray cluster: node 0 is the head."""

    folder: Path
    environment: dict[str, str]
    """Variables of all nodes and clients, beside those that a cluster needs."""
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    nodes: list[Node] = field(default_factory=list)
    _switch: subprocess.Popen[str] | None = None
    _jobs: list[Job] = field(default_factory=list)

    def __getitem__(self, number: int) -> Node:
        return self.nodes[number]

    @property
    def dashboard(self) -> str:
        return f"http://{self[0].address}:8265"

    def _variables(self) -> dict[str, str]:
        """No variable of the test's own Ray or of other clusters comes along."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "TDIFF_"))}
        programs = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
        ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        return kept | {"PATH": programs, "HOME": str(self.folder), "OMP_NUM_THREADS": "1"} | ours | self.environment

    def _mortal(self, *arguments: str, log: Path) -> subprocess.Popen[str]:
        """A process with namespaces of its own that says when it has them, then waits for a line."""
        unshare = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", servers.MORTAL, shutil.which("unshare") or "", *unshare[1:], *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._variables() | {"LOG": str(log)},
            )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            process.wait()
            raise RuntimeError(f"no node could be made:\n{log.read_text()}")
        return process

    def open(self) -> None:
        """The switch: where the cables meet, and from where jobs are submitted."""
        log = self.folder / "switch.log"
        self._switch = self._mortal("bash", "-c", "ip link set lo up && echo ready && read -r _", log=log)
        pid = self._switch.pid
        _ip(pid, "link", "add", "bridge", "type", "bridge")
        _ip(pid, "address", "add", f"{CLIENT}/24", "dev", "bridge")
        _ip(pid, "link", "set", "bridge", "up")

    def add(self, cpus: int) -> Node:
        """Switches one more node on."""
        assert self._switch is not None
        number = len(self.nodes)
        folder, name, address = self.folder / f"node{number}", f"node{number}", f"{NETWORK}{number + 1}"
        (folder / "ray").mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # where the node's own is mounted
        # As Debian's installer leaves it: the machine's own name leads nowhere that other machines could reach.
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        here = [f"--node-ip-address={address}", f"--num-cpus={cpus}", "--object-store-memory=80000000", "--block"]
        if number == 0:
            where = ["--head", "--port=6379", f"--dashboard-host={address}", "--include-dashboard=true"]
        else:
            where = [f"--address={self[0].address}:6379"]
        ray = [servers.program("ray"), "start", "--disable-usage-stats", *where, *here]
        process = self._mortal("bash", "-c", BOOT, "boot", str(folder), name, *ray, log=folder / "log")
        node = Node(number, folder, process, str(Path(f"/proc/{process.pid}/ns/net").readlink()))
        self.nodes.append(node)
        switch = self._switch.pid
        _ip(switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        _ip(switch, "link", "set", name, "master", "bridge", "up")
        _ip(process.pid, "address", "add", f"{address}/24", "dev", "eth0")
        _ip(process.pid, "link", "set", "eth0", "up")
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        return node

    def cut_off(self, node: Node) -> None:
        """Its cable is pulled: its processes live on, and nobody hears them."""
        assert self._switch is not None
        _ip(self._switch.pid, "link", "set", f"node{node.number}", "down")

    def join_again(self, node: Node) -> None:
        """Its cable is put back."""
        assert self._switch is not None
        _ip(self._switch.pid, "link", "set", f"node{node.number}", "up")

    def kill(self, node: Node) -> None:
        """Switches it off, as a power cut would."""
        node.process.kill()
        node.process.wait()

    def client(self, *arguments: str, log: Path, cwd: Path) -> subprocess.Popen[bytes]:
        """A program on the switch's network, which sees the cluster as a person's own machine does."""
        assert self._switch is not None
        inside = ["nsenter", "--net", "--target", str(self._switch.pid)]
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", servers.MORTAL, shutil.which("nsenter") or "", *inside[1:], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=self._variables() | {"RAY_ADDRESS": self.dashboard},
            )

    def start(self, *arguments: str, cwd: Path, name: str) -> Job:
        """A program on the switch's network that ends with the cluster; does not wait for its end."""
        log = self.folder / f"{name}.log"
        self._jobs.append(Job(name, self.client(*arguments, log=log, cwd=cwd), log))
        return self._jobs[-1]

    def submit(self, *command: str, working_dir: Path) -> Job:
        """`ray job submit --working-dir . -- COMMAND`, from a folder; does not wait for its end."""
        name = f"job-{len(self._jobs)}"
        options = ["--submission-id", name, "--working-dir", "."]
        return self.start(servers.program("ray"), "job", "submit", *options, "--", *command, cwd=working_dir, name=name)

    def said(self, job: Job) -> str:
        """What a submitted job has said so far. Its client hears that up to a minute late while a node is silent."""
        (log,) = (self[0].folder / "ray").glob(f"session_2*/logs/job-driver-{job.name}.log")
        return log.read_text(errors="replace")

    def wait_for(self, count: int, seconds: float = 90) -> None:
        """Until so many nodes have joined. Raises TimeoutError."""
        log, deadline = self.folder / "alive.log", time.monotonic() + seconds
        while time.monotonic() < deadline:
            log.write_text("")
            self.client(sys.executable, "-S", "-c", ALIVE, log=log, cwd=self.folder).wait()
            if log.read_text().strip().isdigit() and int(log.read_text()) >= count:
                return
            time.sleep(0.5)
        raise TimeoutError(f"not {count} nodes within {seconds} s:\n{log.read_text()}")

    def close(self) -> None:
        for job in self._jobs:
            job.process.kill()
            job.process.wait()
        for node in self.nodes:
            self.kill(node)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()


@contextlib.contextmanager
def cluster(folder: Path, workers: int, environment: dict[str, str] | None = None, cpus: int = 1) -> Iterator[Nodes]:
    """A head and so many nodes that say they have so many CPUs each, in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = Nodes(folder, environment or {})
    try:
        nodes.open()
        for number in range(workers + 1):
            nodes.add(cpus=cpus if number > 0 else 0)
        nodes.wait_for(workers + 1)
        yield nodes
    finally:
        nodes.close()
