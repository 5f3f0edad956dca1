"""Row 19: two nodes, which are network namespaces of this machine with a link between them, and the link cut."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.harness import FLAGS, NOT_RUN, Launched, assert_same, faults, reached, reference, until_step

CUT_S, LONG_CUT_S = 20.0, 60.0
_NETWORK = "10.177.0"
# In a namespace of its own for network, host name and mounts: wait until the link is there, then train.
_NODE = """
hostname {name}
mount --bind {hosts} /etc/hosts
ip link set lo up
until ip link show {link} > /dev/null 2>&1; do sleep 0.05; done
ip addr add {address}/24 dev {link}
ip link set {link} up
exec "$@"
"""


class Nodes:
    """Two launchers of one run, each in its own namespaces. The first one's run folder is the run's."""

    def __init__(self, out: Path, folder: Path, **changes: object) -> None:
        names, addresses = ("node0", "node1"), (f"{_NETWORK}.1", f"{_NETWORK}.2")
        hosts = folder / "hosts"
        known = "\n".join(f"{address} {name}" for address, name in zip(addresses, names, strict=True))
        hosts.write_text(f"127.0.0.1 localhost\n{known}\n")
        flags = FLAGS | {name.replace("_", "-"): value for name, value in changes.items()}
        train = [sys.executable, "-m", "deitfast", "train", "deit_digits", "--processes=1", "--restarts=3",
                 "--nodes=2", "--master=node0", *(f"--{n}={v}" for n, v in flags.items()), f"--out={out}"]  # fmt: skip
        self.links = [f"df{time.time_ns() % 10**9}{i}" for i in range(2)]
        self.runs = []
        for name, address, link in zip(names, addresses, self.links, strict=True):
            script = _NODE.format(name=name, hosts=hosts, link=link, address=address)
            command = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", script, "node", *train]
            self.runs.append(Launched(out, command, folder / f"{name}.said"))
        time.sleep(0.5)  # they are in their namespaces
        # Held, so that the link outlives the node that ends first: with its network the other's address would go.
        self.held = [os.open(f"/proc/{run.process.pid}/ns/net", os.O_RDONLY) for run in self.runs]
        subprocess.run(["ip", "link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1]], check=True)
        for run, link in zip(self.runs, self.links, strict=True):
            subprocess.run(["ip", "link", "set", link, "netns", str(run.process.pid)], check=True)

    def cut(self, seconds: float) -> None:
        """Take the link's end at the second node down for so long."""
        inside = ["nsenter", "-t", str(self.runs[1].process.pid), "-n", "ip", "link", "set", self.links[1]]
        subprocess.run([*inside, "down"], check=True)
        time.sleep(seconds)
        subprocess.run([*inside, "up"], check=True)

    def text(self) -> str:
        return "\n".join(run.text()[-2000:] for run in self.runs)


@contextmanager
def two_nodes(out: Path, folder: Path, **changes: object) -> Iterator[Nodes]:
    nodes = Nodes(out, folder, **changes)
    try:
        yield nodes
    finally:
        for run in nodes.runs:
            run.end()
        for namespace in nodes.held:
            os.close(namespace)  # and with it the link


def cut_link(folder: Path, count: int) -> str:
    """Row 19: the link is cut for 20 s: the run goes on; for a minute, with little patience: it ends, and resumes."""
    able = ["unshare", "--net", "--uts", "--mount", "ip", "link", "set", "lo", "up"]
    if subprocess.run(able, capture_output=True).returncode:
        return NOT_RUN + "no permission to make network namespaces"
    whole, short, long = reference(folder), folder / "short", folder / "long"
    pauses = []
    with two_nodes(short, folder) as nodes:
        for turn in range(count):
            until_step(nodes.runs[0], 4 + 3 * turn)
            nodes.cut(CUT_S)
            pauses.append(until_step(nodes.runs[0], reached(short)["step"] + 1))
        assert [run.wait() for run in nodes.runs] == [0, 0], nodes.text()
    assert_same(whole, short)
    assert not faults(short, "crash")
    with two_nodes(long, folder, patience=10) as nodes:
        until_step(nodes.runs[0], 4)
        nodes.cut(LONG_CUT_S)
        codes = [run.wait() for run in nodes.runs]
        assert codes == [1, 1], codes
        assert all("is out of reach" in run.text() for run in nodes.runs), nodes.text()
    with two_nodes(long, folder) as nodes:
        assert [run.wait() for run in nodes.runs] == [0, 0], nodes.text()
    assert_same(whole, long)
    return (
        f"two network namespaces, link cut {count} x {CUT_S:.0f} s: next step {max(pauses):.0f} s after it was back, "
        f"none started again; {LONG_CUT_S:.0f} s with a patience of 10 s: both end with 1, and resume; bitwise"
    )
