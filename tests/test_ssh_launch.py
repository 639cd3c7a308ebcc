"""`topology=ssh` on real hosts: network namespaces, each with its own sshd."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import edges
from harness.edges import Kill
from harness.runs import losses, read_line, train, uneven_dataset, wait_for_events, wait_for_step
from harness.ssh_hosts import Cluster
from helpers.hosts import cluster
from macft.config.yaml import read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts, which the user at the terminal calls desk."""
    with cluster(tmp_path_factory.mktemp("hosts"), 3) as made:
        folder = made.home / "config/topology"
        folder.mkdir(parents=True)
        hosts = [host.address for host in made.hosts]
        (folder / "desk.yaml").write_text(json.dumps({"kind": "ssh", "hosts": hosts, "python": [sys.executable]}))
        yield made


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    return [
        *tiny_task,
        "training.batch_size=6",
        "training.steps=6",
        "training.eval_every=0",
        "training.save_every=2",
        "training.export=last",
        "collective.encryption=off",
    ]


def over_ssh(three: Cluster, count: int) -> list[str]:
    hosts = ",".join(host.address for host in three.hosts[:count])
    return ["topology=ssh", f"topology.hosts=[{hosts}]", f"topology.python=['{sys.executable}']"]


def start(three: Cluster, cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "macft.train", *overrides],
        cwd=cwd,
        env=three.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fails(three: Cluster, cwd: Path, *overrides: str) -> str:
    """The one line a command fails with."""
    process = start(three, cwd, *overrides)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    return lines[0]


def agents(three: Cluster, folder: str) -> list[psutil.Process]:
    """Processes of ranks on these hosts whose command names ``folder``."""
    return [process for process in three.agents() if folder in process.info["cmdline"]]


def test_three_hosts_train_and_the_results_come_home(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    process = start(three, tmp_path, *basics, "topology=desk", "topology.ship=[code]", "hydra.run.dir=runs/a/1")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, output + errors
    assert f"[{three.hosts[0].address}] " in output
    assert f"[{three.hosts[2].address}] " in output
    alone = train(*basics, "report.console=false", f"hydra.run.dir={tmp_path / 'alone'}", cwd=tmp_path)
    assert alone.status == 0, alone.errors
    assert losses(tmp_path / "runs/a/1") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    log = (three.hosts[1].home / "macft/runs/a/1/logs/rank-1.log").read_text()
    sha256 = json.loads((tmp_path / "runs/a/1/summary.json").read_text())["adapter_sha256"]
    assert log.splitlines()[-1].endswith(f"finished; adapter sha256 {sha256}")
    assert (three.hosts[2].home / "macft/code/macft/launch/agent.py").is_file()
    assert not agents(three, "runs/a/1")


def test_ctrl_c_ends_with_a_checkpoint_and_the_run_goes_on_from_another_folder(
    three: Cluster, basics: list[str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    uneven_dataset(tmp_path / "rows")
    (tmp_path / "base").symlink_to(tiny_model_folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    typed = ["model=./base", "dataset=./rows", "topology.ship=[data,model]", "hydra.run.dir=out/b/1"]
    process = start(three, tmp_path, *basics, *over_ssh(three, 2), *typed, "training.steps=100000")
    wait_for_step(process, three.hosts[0].home / "macft/out/b/1")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 130, output + errors
    assert not agents(three, "out/b/1")
    folder = tmp_path / "out/b/1"
    made = len(losses(folder))
    process = start(three, elsewhere, f"+resume={folder}", f"training.steps={made + 2}")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    changes = next(line for line in output.splitlines() if "changed after step" in line)
    assert "path" not in changes  # the hosts find model and dataset where they found them before
    assert f"· the results are in {folder}\n" in output
    assert "files are sent" not in output
    assert len(losses(folder)) == made + 2
    here, there = read(folder / "config.yaml"), read(three.hosts[0].home / "macft/out/b/1/config.yaml")
    assert (here.model.path, here.dataset.path) == (str(tmp_path / "base"), str(tmp_path / "rows"))
    assert (there.model.path, there.dataset.path, there.topology.paths) == ("./base", "./rows", {})
    adapter = json.loads((folder / "adapters/adapter_config.json").read_text())
    assert adapter["model"] == str(tmp_path / "base")


def test_the_host_that_leads_dies_and_the_results_come_from_another(
    three: Cluster, basics: list[str], tmp_path: Path
) -> None:
    longer = [*basics, "topology=desk", "training.steps=100000", "collective.encryption=on", "hydra.run.dir=runs/e/1"]
    process = start(three, tmp_path, *longer)
    wait_for_step(process, three.hosts[0].home / "macft/runs/e/1")
    (leader,) = [agent for agent in agents(three, "runs/e/1") if agent.cmdline()[-1] == "0"]
    leader.kill()
    wait_for_events(process, three.hosts[1].home / "macft/runs/e/1", "nodes_changed")
    process.send_signal(signal.SIGHUP)  # the terminal is closed
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 130, output + errors
    assert f"note: {three.hosts[0].address} " in output
    assert f"{three.hosts[0].address} is lost (its process ended); 2 nodes left" in output
    assert losses(tmp_path / "runs/e/1")  # each step from the first one on, though another one has told of those
    assert json.loads((tmp_path / "runs/e/1/summary.json").read_text())["nodes_at_the_end"] == 2
    assert not agents(three, "runs/e/1")


def test_a_node_that_dies_before_all_have_met_ends_the_start(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    """The others need not wait for it: nobody starts it again."""
    outcome = edges.ssh(tmp_path / "runs/g/1", basics, three, Kill(0, "start"))
    assert (outcome.statuses, outcome.has_result) == ([1], False), outcome.output
    dead, other, _ = (host.address for host in three.hosts)
    assert f"note: {dead} was ended by signal 9" in outcome.output
    assert f"[{other}] error: {dead} has ended before all nodes had met" in outcome.output
    assert not (tmp_path / "runs/g/1").exists()


def test_a_leader_that_cannot_write_leaves_the_results_to_another_host(
    three: Cluster, basics: list[str], tmp_path: Path
) -> None:
    process = start(three, tmp_path, *basics, *over_ssh(three, 2), "training.steps=150", "hydra.run.dir=runs/f/1")
    first = three.hosts[0].home / "macft/runs/f/1"
    wait_for_step(process, first)
    (first / "adapters").write_text("in the way")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, output + errors
    assert f"so the results are on rank 1 ({three.hosts[1].address})" in output
    assert json.loads((tmp_path / "runs/f/1/summary.json").read_text())["reason"] == "finished"
    assert (tmp_path / "runs/f/1/adapters/adapters.safetensors").is_file()


def test_the_second_ctrl_c_ends_all_hosts_and_none_takes_another_for_lost(
    three: Cluster, basics: list[str], tmp_path: Path
) -> None:
    # Steps long enough that the second wish comes before the first is met.
    slow = ["training.batch_size=40", "training.micro_batch_size=1", "training.steps=100000", "topology.elastic=false"]
    process = start(three, tmp_path, *basics, *over_ssh(three, 2), *slow, "hydra.run.dir=runs/g/1")
    wait_for_step(process, three.hosts[0].home / "macft/runs/g/1")
    running = agents(three, "runs/g/1")
    process.send_signal(signal.SIGINT)
    while not read_line(process.stderr).startswith("stopping: "):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 130, output + errors
    assert "error" not in output + errors
    _, left = psutil.wait_procs(running, timeout=60)
    assert not left


def test_a_terminal_that_is_closed_while_it_connects_ends_the_launch(
    three: Cluster, basics: list[str], tmp_path: Path
) -> None:
    here = three.hosts[0].address.rpartition(".")[0] + ".1"  # the terminal's machine, on which nothing answers
    with socket.create_server((here, 0)) as silent:
        ssh = [f"topology.ssh=[{three.hosts[0].address},{here}:{silent.getsockname()[1]}]"]
        process = start(three, tmp_path, *basics, *over_ssh(three, 2), *ssh)
        assert "· connecting to 2 hosts ...\n" in iter(lambda: read_line(process.stdout), "")
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (130, "interrupted; no checkpoint had been saved\n")


def test_no_process_outlives_the_terminal(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    longer = [*basics, *over_ssh(three, 2), "training.steps=100000", "hydra.run.dir=runs/c/1"]
    process = start(three, tmp_path, *longer)
    wait_for_step(process, three.hosts[0].home / "macft/runs/c/1")
    running = agents(three, "runs/c/1")
    assert len(running) == 2
    process.kill()
    process.communicate()
    _, left = psutil.wait_procs(running, timeout=100)
    assert not left
    assert list((three.hosts[0].home / "macft/runs/c/1/checkpoints").iterdir())


def both_fail(three: Cluster, cwd: Path, *overrides: str) -> list[str]:
    """The lines, one for each of two hosts, a command fails with."""
    process = start(three, cwd, *overrides)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    lines = errors.strip().splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [host.address for host in three.hosts[:2]], errors
    return lines


@pytest.mark.parametrize(
    ("has_key", "told"),
    [
        (True, "refuses your SSH key; run `ssh-copy-id"),
        (False, "you have no SSH key; run `ssh-keygen -t ed25519`, then"),
    ],
)
def test_a_refused_key_is_named(three: Cluster, basics: list[str], tmp_path: Path, has_key: bool, told: str) -> None:
    (tmp_path / ".ssh").mkdir()
    if has_key:
        key = tmp_path / ".ssh/id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (tmp_path / ".ssh/known_hosts").write_text((three.home / ".ssh/known_hosts").read_text())
    lines = both_fail(Cluster(three.hosts, tmp_path), tmp_path, *basics, *over_ssh(three, 2))
    assert all(told in line for line in lines)


def test_an_unknown_host_key_is_named(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    lines = both_fail(Cluster(three.hosts, tmp_path), tmp_path, *basics, *over_ssh(three, 2))
    assert all("host key is not in known_hosts" in line for line in lines)


def test_an_unreachable_host_is_named(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    nobody = three.hosts[0].address.rsplit(".", 1)[0] + ".99"
    hosts = f"topology.hosts=[{three.hosts[0].address},{nobody}]"
    line = fails(three, tmp_path, *basics, *over_ssh(three, 2), hosts)
    assert line.startswith(f"error: {nobody}: can't be reached over SSH")


def test_another_version_is_named(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    old = tmp_path / "old/mlx_lm-0.1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-lm\nVersion: 0.1.0\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "old"}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    line = fails(three, tmp_path, *basics, *over_ssh(three, 2), f"topology.python=['{sys.executable}','{python}']")
    assert line.startswith(f"error: {three.hosts[1].address}: has mlx-lm 0.1.0, this machine has ")


def test_a_python_that_is_not_there_is_named(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    lines = both_fail(three, tmp_path, *basics, *over_ssh(three, 2), "topology.python=[/nowhere/python]")
    assert all("set topology.python to the Python that has macft" in line for line in lines)


def test_a_port_in_use_is_named(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    address = three.hosts[1].address
    script = (
        f"import socket,sys; s=socket.create_server(('{address}', 7071)); print('on', flush=True); sys.stdin.read()"
    )
    command = three.inside(three.hosts[1], sys.executable, "-c", script)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert read_line(user.stdout) == "on\n"
        line = fails(three, tmp_path, *basics, *over_ssh(three, 2))
        user.communicate("")
    assert line.startswith(f"error: {address}: can't listen on port 7071 (Address already in use)")


def test_a_full_disk_is_named(three: Cluster, basics: list[str], tmp_path: Path) -> None:
    host = three.hosts[1]
    three.over_ssh(host, "mkdir small && mount -t tmpfs -o size=1m none small")
    line = fails(three, tmp_path, *basics, *over_ssh(three, 2), "topology.folder=small")
    three.over_ssh(host, "umount small")
    assert line.startswith(f"error: {host.address}: has 1 MiB of disk free")


def test_data_and_model_travel_and_only_changes_are_sent(
    three: Cluster, basics: list[str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    uneven_dataset(tmp_path / "mine")
    (tmp_path / "model").symlink_to(tiny_model_folder)
    command = [*basics, *over_ssh(three, 2), "model=./model", "dataset=./mine", "topology.ship=[data,model]"]
    sent = []
    for number in (1, 2):
        if number == 2:
            with (tmp_path / "mine/train.jsonl").open("a") as file:
                file.write('{"prompt": "Repeat: one", "completion": "one"}\n')
        process = start(three, tmp_path, *command, "training.steps=1", f"hydra.run.dir=runs/d/{number}")
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, output + errors
        sent.append(re.findall(r"(\d+) files are sent to (\S+)", output))
    assert sorted(sent[1]) == [("1", "macft/mine")] * 2
    assert ("3", "macft/mine") in sent[0]
    assert (three.hosts[1].home / "macft/model/model.safetensors").is_file()


def test_the_doctor_looks_at_all_hosts(three: Cluster, tmp_path: Path) -> None:
    hosts = [host.address for host in three.hosts]
    command = [sys.executable, "-m", "macft.doctor", "--topology", "desk", "--json"]
    done = subprocess.run(
        command, env=three.environment(), cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )
    report = json.loads(done.stdout)
    assert set(report["versions"]) == set(hosts)
    found = {(finding["topic"], finding["level"]) for finding in report["findings"]}
    assert {("versions", "ok"), ("clocks", "ok"), *((f"{host}: links", "ok") for host in hosts)} <= found
    assert {(f"{hosts[rank]} to {hosts[(rank + 1) % 3]}", "ok") for rank in range(3)} <= found
