"""`python -m macft.doctor`: what macOS prints is read, and what is amiss is said with what mends it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.names import NASTY
from macft.device import disk_speed
from macft.diagnostics import LEVELS, machine, network, software
from macft.diagnostics.shareable import without_names
from macft.doctor import find_model, main
from macft.errors import ConfigError
from macft.network import macos
from macft.network.links import Link, discover, linux_kind

PORTS = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: 1c:f6:4c:00:00:01

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 36:17:01:8c:7d:c0

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: 1c:f6:4c:00:00:02

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: 36:17:01:8c:7d:c0

Hardware Port: Thunderbolt 2
Device: en3
Ethernet Address: 36:17:01:8c:7d:c4

VLAN Configurations
===================
"""
BUSY = {
    "_items": [
        {
            "_name": "Mac Studio",
            "device_name_key": "Mac15,14",
            "domain_uuid_key": "28CA4C30-0000",
            "vendor_id_key": "0x0A27",
        }
    ],
    "_name": "thunderboltusb4_bus_0",
    "device_name_key": "MacBook Pro",
    "domain_uuid_key": "817DCFA4-0000",
    "receptacle_1_tag": {
        "current_speed_key": "80 Gb/s",
        "link_status_key": "0x2",
        "receptacle_id_key": "1",
        "receptacle_status_key": "receptacle_connected",
    },
}
IDLE = {
    "_name": "thunderboltusb4_bus_1",
    "device_name_key": "MacBook Pro",
    "domain_uuid_key": "817DCFA4-0001",
    "receptacle_1_tag": {
        "current_speed_key": "Up to 120 Gb/s",
        "link_status_key": "0x100",
        "receptacle_id_key": "2",
        "receptacle_status_key": "receptacle_no_devices_connected",
    },
}
THUNDERBOLT = json.dumps({"SPThunderboltDataType": [BUSY, IDLE]})
IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 10.0.0.1 netmask 0xffffff00 broadcast 10.0.0.255
\tmedia: autoselect (10Gbase-T <full-duplex>)
\tstatus: active
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tConfiguration:
\tmember: en2 flags=3<LEARNING,DISCOVER>
\tmember: en3 flags=3<LEARNING,DISCOVER>
\tstatus: active
"""


def test_macos_tells_kinds_and_speeds_of_its_links() -> None:
    assert macos.kinds(PORTS, THUNDERBOLT, IFCONFIG) == {
        "en0": ("ethernet", 10_000),
        "bridge0": ("thunderbolt", 80_000),
        "en1": ("wifi", None),
        "en2": ("thunderbolt", 80_000),
        "en3": ("thunderbolt", None),
    }


def test_a_mac_behind_a_dock_is_seen_and_a_drive_is_no_mac() -> None:
    dock = {"_name": "Dock", "_items": [{"_name": "Drive"}, *BUSY["_items"]]}
    text = json.dumps({"SPThunderboltDataType": [{**BUSY, "_items": [dock]}]})
    ports = macos.thunderbolt_ports(text)
    assert ports == [macos.ThunderboltPort("1", 80_000, ("Mac15,14",))]
    assert network.thunderbolt_findings(ports)[0].text == "port 1: Mac15,14 at 80 Gbit/s"
    assert network.thunderbolt_findings(macos.thunderbolt_ports(json.dumps({"SPThunderboltDataType": [IDLE]}))) == []


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["_items", "SPThunderboltDataType", "receptacle_1_tag", "current_speed_key", "_name"]),
                inner,
            )
        ),
    )
)
def test_any_json_is_survived(value: object) -> None:
    assert isinstance(macos.thunderbolt_ports(json.dumps({"SPThunderboltDataType": value})), list)
    assert macos.thunderbolt_ports(json.dumps(value)[1:]) == [] or isinstance(value, int | str)


@pytest.mark.parametrize(
    ("text", "levels", "mend"),
    [
        (" sleep                0\n lowpowermode         0\n", ["ok", "ok"], ""),
        (
            " sleep                1 (sleep prevented by x)\n lowpowermode         1\n",
            ["warning", "warning"],
            "lowpowermode 0",
        ),
        (" sleep                10\n powermode            1\n", ["warning", "warning"], "powermode 0"),
        (" sleep                0\n powermode            2\n", ["ok", "ok"], ""),
        ("", ["warning"], "pmset -g"),
    ],
)
def test_power_and_sleep_settings(text: str, levels: list[str], mend: str) -> None:
    findings = machine.sleep_settings(text)
    assert [finding.level for finding in findings] == levels
    assert findings[0].mend.endswith(mend)


def test_thermal_pressure() -> None:
    key = "com.apple.system.thermalpressurelevel"
    assert machine.pressure(f"{key} 0\n")[0].level == "ok"
    assert machine.pressure(f"{key} 2\n")[0].text == "thermal pressure is heavy"
    assert machine.pressure("")[0].level == "warning"


def test_memory_and_disk_thresholds(tmp_path: Path) -> None:
    assert machine.memory(2**30, 2**33).level == "warning"
    assert machine.memory(2**32, 2**33).level == "ok"
    levels = [machine.disk(free, tmp_path).level for free in (2**29, 2**32, 2**34)]
    assert levels == ["problem", "warning", "ok"]


def test_the_disks_speed_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    assert disk_speed.stored() is None
    assert disk_speed.disk_speed().source in ("table", "assumed")
    measured = disk_speed.measure(size=(1 << 20) + 5)
    assert measured > 0
    assert disk_speed.disk_speed() == disk_speed.DiskSpeed(measured, "measured")
    assert [path.name for path in (tmp_path / "macft").iterdir()] == ["disk-speed.json"]
    for content in (
        "",
        "[]",
        '{"bytes_per_second": "x"}',
        '{"bytes_per_second": -1}',
        "{}",
        '{"bytes_per_second": 1e999}',
    ):
        (tmp_path / "macft" / "disk-speed.json").write_text(content)
        assert disk_speed.stored() is None
    finding = machine.disk_reads()
    assert "GB/s" in finding.text
    assert finding.level in ("ok", "warning")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: tmp_path / "file")
    refused = machine.disk_reads()
    assert refused.level == "warning"
    assert refused.text.startswith("not measured: ")


def test_linux_links_from_sysfs(tmp_path: Path) -> None:
    for name, files in {
        "eth0": {"type": "1\n", "speed": "2500\n"},
        "eth1": {"type": "1\n", "speed": "-1\n"},
        "br0": {"type": "1\n", "bridge/x": "", "brif/eth1/x": "", "brif/vnet3/x": ""},
        "wlan0": {"type": "1\n", "wireless/x": ""},
        "thunderbolt0": {"type": "1\n", "speed": "20000\n"},
        "tun0": {"type": "65534\n"},
        "office": {"type": "1\n", "tun_flags": "0x1002\n"},
        "veth0": {"type": "1\n", "speed": "10000\n"},
        "docker0": {"type": "1\n", "bridge/x": "", "brif/veth0/x": ""},
        "br-0123456789ab": {"type": "1\n", "bridge/x": ""},
        "machines": {"type": "1\n", "bridge/x": "", "brif/tap0/x": ""},
    }.items():
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    names = ("eth0", "eth1", "br0", "wlan0", "thunderbolt0")
    assert [linux_kind(name, tmp_path) for name in names] == [
        ("ethernet", 2500),
        ("ethernet", None),
        ("ethernet", None),
        ("wifi", None),
        ("thunderbolt", 20000),
    ]
    for name in ("tun0", "office", "veth0", "docker0", "br-0123456789ab", "machines"):
        assert linux_kind(name, tmp_path) == ("other", None)


def test_wifi_alone_is_warned_of() -> None:
    wifi = Link("en0", "wifi", "192.168.0.2/24")
    assert [finding.level for finding in network.link_findings((wifi,))] == ["ok", "warning"]
    vpn = Link("utun3", "other", "100.64.0.2/10")
    assert [finding.level for finding in network.link_findings((wifi, vpn))] == ["ok", "ok", "warning"]
    assert [finding.level for finding in network.link_findings((vpn,))] == ["ok", "problem"]
    assert network.link_findings(())[0].level == "problem"
    assert all(not link.address.startswith("127.") for link in discover())


def test_a_port_in_use_is_a_problem() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        finding = network.port_findings(taken.getsockname()[1])[0]
    assert finding.level == "problem"
    assert "lsof" in finding.mend


def test_versions_and_clocks_that_differ_are_named() -> None:
    ours = {"python": "3.12.1", "mlx": "0.32.4"}
    assert [f.level for f in software.differences({"a": ours, "b": {**ours, "python": "3.12.9"}})] == ["ok"]
    found = software.differences({"a": ours, "b": {**ours, "mlx": "0.31.0"}})
    assert (found[0].level, found[0].text) == ("problem", "b has mlx 0.31.0, a has 0.32.4")
    assert found[0].mend == "ssh b python3 -m pip install mlx==0.32.4"
    assert [f.level for f in network.clock_findings({"a": 0.1, "b": -20.0})] == ["warning"]
    assert [f.level for f in network.clock_findings({"a": 0.1})] == ["ok"]
    assert network.clock_findings({}) == []  # nobody was reached


@pytest.mark.parametrize(
    ("name", "level", "mend"),
    [
        ("llama-3.2-1b", "warning", "hf download mlx-community/Llama-3.2-1B-Instruct-4bit "),
        ("some/model-of-the-hub", "warning", "hf download some/model-of-the-hub "),
        ("smollm2-135m", "warning", "topology.ship=[model]"),
        ("lama-3.2-1b", "problem", "give a folder, a hub id (org/name), or one of gemma-3-1b, "),
    ],
)
def test_a_model_that_is_not_here_is_fetched_by_a_command_that_works(
    name: str, level: str, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finding = find_model(name)
    assert finding.level == level
    assert mend in finding.mend


@pytest.mark.slow
def test_the_command_reports_this_machine(tmp_path: Path, tiny_model_folder: Path) -> None:
    model = tmp_path / NASTY
    model.symlink_to(tiny_model_folder)
    command = [sys.executable, "-m", "macft.doctor", "--json", "--model", str(model)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(done.stdout)
    topics = {finding["topic"] for finding in report["findings"]}
    assert {"packages", "BLAS", "memory", "disk", "disk speed", "thermal", "links", "ports", "keys", "model"} <= topics
    assert {"topic": "model", "level": "ok", "text": f"{model} is in {model}", "mend": ""} in report["findings"]
    assert all(finding["level"] in LEVELS for finding in report["findings"])
    assert all(finding["mend"] for finding in report["findings"] if finding["level"] != "ok")
    assert done.returncode == int(any(finding["level"] == "problem" for finding in report["findings"]))
    assert report["versions"] == software.versions()


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACFT_CONFIG", str(tmp_path))
    command = [sys.executable, "-m", "macft.doctor", "--topology", "desk"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: topology: no cluster 'desk' (there are: none yet); make it: python -m macft.cluster init desk"
    ]


# What people attach to an issue


@given(
    st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str),
    st.sampled_from(["{}", "at {}:7070", "({}/24)", "jane@{}", "cannot reach {}; is it on?"]),
)
def test_no_address_is_left_in_a_text(address: str, form: str) -> None:
    assert address not in without_names(form.format(address), []) or address == "::"


def test_what_names_a_machine_is_left_out_and_what_describes_it_is_not() -> None:
    text = (
        "Janes-MacBook-Pro.local, C02XK1ABJG5H, 1c:f6:4c:00:00:01, jane@studio.lan, /Users/jane/runs, "
        "28CA4C30-1111-2222-3333-444455556666: Apple M2 Max, Metal, 32 GiB, mlx 0.32.4, macOS 15.1, 12:30:45"
    )
    cleaned = without_names(text, ["/Users/jane", "Janes-MacBook-Pro.local", "jane"])
    for private in ("jane", "C02XK1ABJG5H", "1c:f6", "studio", "28CA4C30"):
        assert private.lower() not in cleaned.lower(), cleaned
    for told in ("Apple M2 Max, Metal, 32 GiB, mlx 0.32.4, macOS 15.1", "/runs"):
        assert told in cleaned, cleaned


@pytest.mark.slow
def test_the_report_of_this_machine_names_nobody(tmp_path: Path) -> None:
    home = tmp_path / "janedoe"
    home.mkdir()
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    environment = {**os.environ, "HOME": str(home), "USER": "janedoe", "LOGNAME": "janedoe", "XDG_CACHE_HOME": cache}
    path = home / NASTY / "report.json"
    path.parent.mkdir()
    command = [sys.executable, "-m", "macft.doctor", "--report", str(path)]
    subprocess.run(command, check=True, cwd=home, env=environment, capture_output=True, timeout=280)
    text = path.read_text()
    report = json.loads(text)
    assert report["smoke_run"]["result"] == "works", report["smoke_run"]
    assert report["smoke_run"]["steps"] == 3
    assert report["versions"]["mlx"]
    assert {"kind", "speed_mbit"} == set().union(*(set(link) for link in report["links"])) or not report["links"]
    for private in ("janedoe", socket.gethostname(), *(link.host for link in discover())):
        assert not re.search(rf"(?<!\w){re.escape(private)}(?!\w)", text), private


def test_a_report_is_of_this_machine() -> None:
    with pytest.raises(ConfigError, match=r"--report: it describes this machine"):
        main(["--report", "x.json", "--topology", "desk"])
