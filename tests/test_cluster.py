"""The files of examples/cluster, without a cluster: what they start, and what they do with its exit code."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from deitfast.cli.train import _launch, add_train
from deitfast.guard import EXIT_FILE
from deitfast.training.launch import parse_flags
from tests.faults.harness import reached

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"
RECIPE = ["deit_base", "--data", "/shared/a folder", "--out", "/shared/runs/deit_base"]


def flags_of(command: list[str]) -> argparse.Namespace:
    """What `deitfast train` makes of a command; the flags that it leaves must be the recipe's."""
    from deitfast.cli.recipes import load_recipe

    parser = argparse.ArgumentParser()
    add_train(parser.add_subparsers())
    assert command[:2] == ["deitfast", "train"]
    known, left = parser.parse_known_args(command[1:])
    recipe = parse_flags(load_recipe(known.recipe), left)
    assert recipe.data
    assert recipe.out
    return known


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Commands for PATH that write what they were asked for to `said`, a line each, quoted for a shell.

    srun and ssh run, here, what they are to run elsewhere; `deitfast` ends with the code in `code`, a host each, and at
    a SIGTERM with 75 where that file is not there.
    """
    say = f'line=$(printf "%q " "${{0##*/}}" "$@"); echo "$line" >> {tmp_path}/said'  # one write, for several write
    deitfast = f"""[ -e {tmp_path}/code ] && exit $(cat {tmp_path}/code)
trap 'exit 75' TERM
for _ in $(seq 300); do sleep 0.1; done"""
    programs = {
        "srun": f'{say}\nwhile [[ "$1" == --* ]]; do shift; done\n"$@"',
        "ssh": f'{say}\nshift 2\nexec bash -c "$*"',
        "scontrol": f'{say}\n[ "$1" = show ] && printf "node0\\nnode1\\n"',
        "deitfast": f"{say}\n{deitfast}",
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return tmp_path


def start(script: str, here: Path, recipe: list[str] = RECIPE, **environment: str) -> subprocess.Popen[bytes]:
    path = f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen([CLUSTER / script, *recipe], cwd=here, env=os.environ | {"PATH": path} | environment)


def said(here: Path, program: str) -> list[list[str]]:
    lines = [shlex.split(line) for line in (here / "said").read_text().splitlines()]
    return [line for line in lines if line[0] == program]


@pytest.mark.parametrize("script", sorted(path.name for path in CLUSTER.glob("*.sh")))
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", CLUSTER / script], check=True)
    assert os.access(CLUSTER / script, os.X_OK)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75])
def test_a_slurm_job_goes_back_into_the_queue_where_it_was_asked_to_stop(stand_ins: Path, code: int) -> None:
    (stand_ins / "code").write_text(str(code))
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    assert start("slurm.sh", stand_ins, SLURM_CPUS_PER_TASK="4", **job).wait(30) == code
    (command,) = said(stand_ins, "deitfast")
    flags = flags_of(command)
    assert command[2:7] == RECIPE
    assert (flags.nodes, flags.master, flags.restarts) == (2, "node0:23456", 3)
    assert said(stand_ins, "scontrol")[1:] == ([["scontrol", "requeue", "123456"]] if code == 75 else [])


def test_a_slurm_job_is_warned_by_a_signal_that_saves() -> None:
    lines = (CLUSTER / "slurm.sh").read_text().splitlines()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert asked["signal"] == "USR1@120"  # to the steps, that is the launchers; with B: before it to the shell alone
    assert asked["ntasks-per-node"] == "1"
    assert "requeue" in asked


@pytest.mark.parametrize("code", [0, 1, 3])
def test_every_host_gets_the_same_command(stand_ins: Path, code: int) -> None:
    (stand_ins / "code").write_text(str(code))
    assert start("ssh.sh", stand_ins, HOSTS="node0 node1").wait(30) == code
    assert sorted(line[2] for line in said(stand_ins, "ssh")) == ["node0", "node1"]
    first, second = said(stand_ins, "deitfast")
    assert first == second
    flags = flags_of(first)
    assert first[2:7] == RECIPE
    assert (flags.nodes, flags.master) == (2, "node0:29400")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_ssh_script_reaches_every_host(stand_ins: Path, number: int) -> None:
    script = start("ssh.sh", stand_ins, HOSTS="node0 node1")
    until = time.monotonic() + 20
    while not (stand_ins / "said").exists() or len(said(stand_ins, "deitfast")) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)  # they set their traps
    script.send_signal(number)
    assert script.wait(20) == 75
    assert len(said(stand_ins, "ssh")) == 4


def test_a_launcher_that_loses_the_others_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def lost(_: list[str]) -> None:
        raise RendezvousConnectionError("The connection to the C10d store has failed.\nSee inner exception.")

    monkeypatch.setattr(torchrun, "main", lost)
    for name in (EXIT_FILE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "PET_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "")  # which `_launch` sets
    with pytest.raises(SystemExit) as end:
        _launch([], Path("recipe.py"))
    logging.disable(logging.NOTSET)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "another machine's launcher is out of reach (The connection to the C10d store has failed.)." in line
    assert line.endswith("The same command on all resumes")


@pytest.mark.slow
def test_two_launchers_train_together_and_one_that_is_asked_to_stop_stops_both(stand_ins: Path) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    out = stand_ins / "run"
    deitfast = stand_ins / "bin" / "deitfast"
    deitfast.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m deitfast "$@"\n')
    recipe = ["deit_digits", "--processes", "1", "--epochs", "100", "--workers", "1", "--out", str(out)]
    hosts = {
        "HOSTS": "localhost 127.0.0.1",
        "PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CLUSTER.parent.parent),
    }
    script = start("ssh.sh", stand_ins, recipe, **hosts)
    logs = [stand_ins / "logs" / f"{host}.log" for host in hosts["HOSTS"].split()]
    try:
        until = time.monotonic() + 120
        while reached(out)["step"] < 2:
            assert time.monotonic() < until, [log.read_text() for log in logs]
            assert script.poll() is None, [log.read_text() for log in logs]
            time.sleep(0.1)
        os.kill(int(logs[1].with_suffix(".pid").read_text()), signal.SIGTERM)
        assert script.wait(60) == 75, [log.read_text() for log in logs]
    finally:
        script.send_signal(signal.SIGTERM)
        script.wait(60)
    said = logs[0].read_text()
    assert "fp32 on 2 cpu process(es)" in said
    assert "SIGTERM: saved at step" in said


def test_the_jobset_starts_as_many_pods_as_nodes_and_ends_where_no_restart_helps() -> None:
    yaml = pytest.importorskip("yaml")
    job_set = yaml.safe_load((CLUSTER / "jobset.yaml").read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    flags = flags_of(container["command"])
    assert job["parallelism"] == job["completions"] == flags.nodes
    assert flags.processes == container["resources"]["limits"]["nvidia.com/gpu"]
    name = job_set["metadata"]["name"]
    assert flags.master == f"{name}-{replicated['name']}-0-0.{name}:29400"
    rules = {
        code: rule["action"] for rule in job["podFailurePolicy"]["rules"] for code in rule["onExitCodes"]["values"]
    }
    assert rules == {2: "FailJob", 3: "FailJob", 75: "Ignore"}
    assert pod["restartPolicy"] == "Never"  # which a policy for exit codes asks for
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
