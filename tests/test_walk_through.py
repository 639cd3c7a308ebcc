"""docs/cluster.md, step by step: from three machines that know nothing of each other to a run, as a reader types it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.runs import events, read_line, uneven_dataset, wait_for_events
from harness.ssh_hosts import Cluster, Host
from helpers.docs import PAGES, Command, commands
from helpers.hosts import cluster
from helpers.machines import ended

pytestmark = pytest.mark.slow
MARKED = [
    command for page in PAGES for command in commands(page) if command.not_run.startswith("tests/test_walk_through.py")
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three machines with two cables each. The reader sits at the first, whose SSH key no machine has yet."""
    with cluster(tmp_path_factory.mktemp("hosts"), 3, two_cables=True) as made:
        shutil.copytree(made.home / ".ssh", made.hosts[0].home / ".ssh")
        yield made


def typed(three: Cluster, host: Host, command: Command | str, *more: str, **texts: str) -> subprocess.Popen[str]:
    """A command of the page typed on ``host``, with ``texts`` for what differs here, and ``more`` words."""
    text = command if isinstance(command, str) else command.text
    for old, new in texts.items():
        text = text.replace(old, new)
    text = text.replace("python -m", f"{sys.executable} -m", 1)
    environment = {
        **three.environment(),
        "HOME": str(host.home),
        "MACFT_CONFIG": str(host.home / "config"),
        "MACFT_KEYS": str(host.home / "keys"),
        "XDG_CACHE_HOME": str(Path.home() / ".cache"),
    }
    script = f"hostname {host.namespace}; exec {text} {' '.join(more)}"
    return subprocess.Popen(
        three.inside(host, "unshare", "--uts", "sh", "-c", script),
        env=environment,
        cwd=host.home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def of_the_page(beginning: str) -> Command:
    """The command of the page that begins so."""
    (found,) = {command.text: command for command in MARKED if command.text.startswith(beginning)}.values()
    return found


def test_all_commands_marked_for_this_test_are_typed_here() -> None:
    source = Path(__file__).read_text()
    typed_here = re.findall(r"of_the_page\(\"([^\"]+)\"\)", source)
    for command in MARKED:
        assert any(command.text.startswith(beginning) for beginning in typed_here), command


def test_two_and_three_are_the_machines_fit_and_do_they_form_a_cluster(three: Cluster) -> None:
    first, *others = three.hosts
    fit = typed(three, first, "python -m macft.doctor")
    init = typed(three, first, of_the_page("python -m macft.cluster init desk --nodes"))
    line = read_line(init.stdout)
    told = re.search(r"join (\d{4}-\d{4}) --name desk", line)
    assert told is not None, line
    place = re.search(r"--at (\S+)\)", read_line(init.stdout))
    assert place is not None
    join = of_the_page("python -m macft.cluster join")
    code = join.words[4]
    wrong = "1111-2222" if told[1] != "1111-2222" else "1111-2223"
    assert "the code is wrong" in ended(typed(three, others[0], join, "--at", place[1], **{code: wrong}), 1)
    joining = [
        typed(three, others[0], join, **{code: told[1]}),
        typed(three, others[1], join, "--at", place[1], **{code: told[1]}),
    ]
    for process in (init, *joining):
        assert "the cluster is in" in ended(process)
    assert "PROBLEM" not in ended(fit)
    files = [yaml.safe_load((host.home / "config/topology/desk.yaml").read_text()) for host in three.hosts]
    assert files[0] == files[1] == files[2]
    second = [host.address.replace("10.77.", "10.78.") for host in three.hosts]
    assert sorted(files[0]["hosts"]) == [
        f"{host.address}+{other}" for host, other in zip(three.hosts, second, strict=True)
    ]
    names = [host.namespace for host in three.hosts]
    for host in three.hosts:
        trusted = (host.home / "keys/trusted").read_text().split()[::2]
        assert sorted(trusted) == [name for name in names if name != host.namespace]


def test_four_let_ssh_in(three: Cluster) -> None:
    """``ssh-copy-id`` asks for a password, which these hosts lack: the file it would change is changed instead."""
    first = three.hosts[0]
    doctor = of_the_page("python -m macft.doctor --topology")
    keys = first.home.parent / "authorized_keys"
    allowed = keys.read_text()
    keys.write_text("")
    refused = ended(typed(three, first, doctor), 1)
    assert all(f"root@{host.address}: refuses your SSH key; run `ssh-copy-id" in refused for host in three.hosts)
    keys.write_text(allowed)
    report = ended(typed(three, first, doctor))
    assert "PROBLEM" not in report
    assert all(host.address in report for host in three.hosts)


def test_five_train_lose_a_cable_and_stop(three: Cluster, tiny_model_folder: Path) -> None:
    first = three.hosts[0]
    data = uneven_dataset(first.home.parent / "rows")
    run = typed(
        three,
        first,
        of_the_page("python -m macft.train"),
        *(f"model={tiny_model_folder}", f"dataset={data}", "dataset.metric=null", "training.metric_rows=0"),
        *("adapter.num_layers=-1", "training.steps=1000000", "training.eval_every=0", "training.save_every=0"),
        *("collective.piece_bytes=4096", "report.tensorboard=false", "hydra.run.dir=runs/walk/1"),
    )
    folder = first.home / "macft/runs/walk/1"
    wait_for_events(run, folder, "step_done")
    subprocess.run(["ip", "-n", three.hosts[1].namespace, "link", "set", "eth1", "down"], check=True)
    wait_for_events(run, folder, "noted", text="a cable to the next node is lost (10.78.")
    steps = len(events(folder, "step_done"))
    run.send_signal(signal.SIGINT)
    output = ended(run, 130)
    assert re.search(r"\] .*a cable to the next node is lost", output), output
    assert f"[{three.hosts[2].address}] " in output
    assert "[conn=" not in output  # what the SSH library logs
    assert len(events(first.home / "runs/walk/1", "step_done")) >= steps
    assert list((first.home / "runs/walk/1/checkpoints").iterdir())


def test_machines_and_clusters_are_removed(three: Cluster) -> None:
    first, second, _ = three.hosts
    assert "removed" in ended(typed(three, first, f"python -m macft.cluster remove desk {second.address}"))
    listed = ended(typed(three, first, "python -m macft.cluster list desk"))
    assert len(listed.splitlines()) == 2
    assert second.address not in listed
    assert "removed desk" in ended(typed(three, first, "python -m macft.cluster remove desk"))
