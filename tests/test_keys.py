"""`python -m macft.keys`: files that nobody else can read, and lines a user can act on."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from macft import keys as command
from macft.cli.run_command import run_command
from macft.collective.ring.security import KeyPair
from macft.collective.settings import CollectiveConfig
from macft.errors import ConfigError
from macft.rendezvous import keystore
from macft.topology.settings import TopologyConfig

OTHER = KeyPair.new().public.hex()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MACFT_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Status, output and errors of ``macft keys``."""
    status = run_command(command.main, argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_two_machines_are_set_up_by_the_lines_that_show_prints(tmp_path: Path) -> None:
    def on(machine: str, *argv: str) -> str:
        environment = {**os.environ, "MACFT_KEYS": str(tmp_path / machine)}
        done = subprocess.run(
            [sys.executable, "-m", "macft.keys", *argv], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    lines = {}
    for machine in ("a", "b"):
        made = on(machine)
        assert on(machine, "make").splitlines()[1:] == made.splitlines()[1:] == on(machine, "show").splitlines()
        found = re.search(r"python -m macft\.keys (trust \S+ [0-9a-f]{64})$", made, re.MULTILINE)
        assert found is not None
        lines[machine] = found[1].split()
    on("a", "trust", "studio", lines["b"][2])
    on("b", *lines["a"])
    first, second = keystore.load(tmp_path / "a"), keystore.load(tmp_path / "b")
    assert first.trusted == {"studio": second.own.public}
    assert second.trusted == {keystore.own_name(): first.own.public}
    assert first.members == (first.own.public, second.own.public)
    assert "trusted here: studio" in on("a", "show")
    on("a", "forget", "studio")
    assert keystore.load(tmp_path / "a").trusted == {}


def test_only_the_owner_can_read_the_files_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        keystore.make(folder)
        keystore.trust(folder, "studio", OTHER)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}
    assert modes == {"keys": 0o700, "secret": 0o600, "trusted": 0o600}


@pytest.mark.parametrize("name", ["", "secret", "trusted"])
@pytest.mark.parametrize("more", [0o040, 0o004, 0o020])
def test_files_that_others_may_use_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, more: int
) -> None:
    keystore.make(folder)
    keystore.trust(folder, "studio", OTHER)
    path = folder / name
    right = stat.S_IMODE(path.stat().st_mode)
    path.chmod(right | more)
    for argv in (["show"], ["make"], ["forget", "studio"]):
        status, _, errors = run(capsys, *argv)
        assert status == 2
        assert errors == f"error: {path}: others may use it (mode {right | more:o}); run `chmod {right:o} '{path}'`\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show"], "this machine has no key yet; run `python -m macft.keys make`"),
        (["trust", "studio", OTHER], "this machine has no key yet"),
        (["make", "trust", "studio", "abc"], "'abc' is not a key: 64 hexadecimal digits"),
        (["make", "trust", "-studio", OTHER], "the following arguments are required"),
        (["make", "trust", "my mac", OTHER], "'my mac' is not a name"),
        (["make", "trust", "a\nb", OTHER], "is not a name"),
        (["make", "forget", "studio"], "'studio' is not trusted here; trusted: nobody"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    if argv[0] == "make":
        keystore.make(folder)
        argv = argv[1:]
    status, out, errors = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert message in errors
    assert errors.count("error:") == 1


def test_a_name_keeps_its_key_until_it_is_forgotten(folder: Path) -> None:
    own, _ = keystore.make(folder)
    keystore.trust(folder, "studio", OTHER.upper())
    keystore.trust(folder, "studio", OTHER)
    with pytest.raises(ConfigError, match=r"studio is trusted with another key.*forget studio"):
        keystore.trust(folder, "studio", KeyPair.new().public.hex())
    with pytest.raises(ConfigError, match="this machine's own key"):
        keystore.trust(folder, "here", own.own.public.hex())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("secret", b"nothing", "not a key of 64 hexadecimal digits"),
        ("secret", b"\xff" * 64, "not a key of 64"),
        ("trusted", b"studio\n", "line 1 is not NAME KEY"),
        ("trusted", f"a {OTHER}\nb {OTHER[:-1]}\n".encode(), "line 2 is not NAME KEY"),
        ("trusted", b"a" * 70_000, "more than 65536 bytes"),
    ],
)
def test_malformed_files_are_named(folder: Path, name: str, content: bytes, told: str) -> None:
    keystore.make(folder)
    (folder / name).write_bytes(content)
    (folder / name).chmod(0o600)
    with pytest.raises(ConfigError, match=told) as caught:
        keystore.load(folder)
    assert str(folder / name) in str(caught.value)


def test_commands_at_the_same_time_lose_nothing(folder: Path) -> None:
    keystore.make(folder)
    names = [f"mac{i}" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: keystore.trust(folder, name, KeyPair.new().public.hex()), names))
    assert sorted(keystore.load(folder).trusted) == sorted(names)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["127.0.0.1:7070", "127.0.0.2:7072"], False),
        (["localhost", "[::1]:7072", "[::1]"], False),
        (["127.0.0.1", "192.168.0.2"], True),
        (["studio.local", "mini.local"], True),
        (["127.0.0.1.example.org", "localhost"], True),
    ],
)
def test_auto_encrypts_beyond_loopback(hosts: list[str], expected: bool) -> None:
    topology = TopologyConfig(kind="hosts", hosts=hosts)
    assert keystore.needs_keys(topology, CollectiveConfig()) == expected
    assert keystore.needs_keys(topology, CollectiveConfig(encryption="on"))
    assert not keystore.needs_keys(topology, CollectiveConfig(encryption="off"))
    assert not keystore.needs_keys(TopologyConfig(kind="local", nodes=3), CollectiveConfig())


def test_keys_are_where_the_configuration_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MACFT_KEYS", raising=False)
    monkeypatch.setenv("MACFT_CONFIG", str(tmp_path))
    assert keystore.key_folder() == tmp_path / "keys"
    monkeypatch.setenv("MACFT_KEYS", str(tmp_path / "elsewhere"))
    assert keystore.key_folder() == tmp_path / "elsewhere"


def test_machines_of_one_name_are_both_trusted(folder: Path) -> None:
    own = keystore.make(folder)[0].own.public.hex()
    first, second, third = (KeyPair.new().public.hex() for _ in range(3))
    assert keystore.trust_all(folder, {"MacBook": first, "me": own}) == []
    (line,) = keystore.trust_all(folder, {"MacBook": second, "studio": third})
    assert line.startswith("note: another machine is trusted as MacBook, this one now as MacBook-2;")
    assert keystore.trust_all(folder, {"again": first, "MacBook": second}) == []  # known by other names
    trusted = {name: key.hex() for name, key in keystore.load(folder).trusted.items()}
    assert trusted == {"MacBook": first, "MacBook-2": second, "studio": third}
