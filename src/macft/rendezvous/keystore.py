"""This machine's key and the keys it trusts, in files that only their owner can read.

``secret`` holds the secret key, ``trusted`` a line ``NAME KEY`` for each other machine; a key is 64 hexadecimal digits.
The files are in ``keys`` in the user's configuration folder, or in the folder that ``MACFT_KEYS`` names.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import platform
import re
import secrets
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from macft.collective.ring.security import KEY_BYTES, KeyPair
from macft.collective.settings import CollectiveConfig
from macft.device.user_folder import user_config_folder
from macft.errors import ConfigError
from macft.topology.settings import TopologyConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")
_MAX_FILE_BYTES = 65_536
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|\[::1\]")


@dataclass(frozen=True)
class Keyring:
    """This machine's key pair, and the public keys of the machines it trusts, by name."""

    own: KeyPair
    trusted: Mapping[str, bytes]

    @property
    def members(self) -> tuple[bytes, ...]:
        """Public keys of all machines that may join a run, this one's first."""
        return (self.own.public, *(key for key in self.trusted.values() if key != self.own.public))


def key_folder() -> Path:
    """The folder of this user's keys."""
    override = os.environ.get("MACFT_KEYS")
    return Path(override).expanduser() if override else user_config_folder() / "keys"


def own_name() -> str:
    """This machine's name, as other machines use it in ``trust``."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node().removesuffix(".local")).strip("-._")
    return name[:64] or "mac"


def needs_keys(topology: TopologyConfig, collective: CollectiveConfig) -> bool:
    """Whether a run is encrypted: ``collective.encryption``, with ``auto`` resolved.

    The result is the same on all ranks. Names are not resolved, because a machine may resolve its own name to loopback.

    Raises:
        ConfigError: it should be encrypted, but the backend can't.
    """
    is_needed = collective.encryption == "on" or (collective.encryption == "auto" and not _is_loopback(topology))
    if is_needed and collective.backend != "ring":
        raise ConfigError(
            f"collective.backend: {collective.backend} has no encryption; use collective=ring, or, on cables that "
            "nobody else can reach, collective.encryption=off"
        )
    return is_needed


def run_keyring(secret: bytes) -> Keyring:
    """The keyring of a run whose nodes all have the same ``secret`` (32 bytes), made for this run."""
    return Keyring(KeyPair.from_secret(secret), {})


def _is_loopback(topology: TopologyConfig) -> bool:
    paths = [path for host in topology.hosts for path in host.split("+")]
    return all(_LOOPBACK.fullmatch(path if path.endswith("]") else re.sub(r":\d+$", "", path)) for path in paths)


def keyring_for(topology: TopologyConfig, collective: CollectiveConfig) -> Keyring | None:
    """The keys for a run; None if it is not encrypted.

    Raises:
        ConfigError: it is encrypted, and this machine has no usable keys; says how to fix it.
    """
    return load(key_folder()) if needs_keys(topology, collective) else None


def load(folder: Path) -> Keyring:
    """Reads the keys in ``folder``.

    Raises:
        ConfigError: there are none, others can read them, or they are malformed; says how to fix it.
    """
    if not (folder / "secret").exists():
        raise ConfigError(
            f"{folder}: this machine has no key yet; run `python -m macft.keys make`, or, on a cable that nobody "
            "else can reach, set collective.encryption=off on all nodes"
        )
    _check_private(folder, 0o700)
    secret = _read(folder / "secret").strip()
    if not _KEY.fullmatch(secret):
        raise ConfigError(f"{folder / 'secret'}: not a key of {2 * KEY_BYTES} hexadecimal digits; remove it")
    trusted = {}
    lines = _read(folder / "trusted").splitlines() if (folder / "trusted").exists() else []
    for number, line in enumerate(lines, 1):
        name, _, key = line.strip().partition(" ")
        if not _NAME.fullmatch(name) or not _KEY.fullmatch(key):
            raise ConfigError(f"{folder / 'trusted'}: line {number} is not NAME KEY; correct or remove it")
        trusted[name] = bytes.fromhex(key)
    return Keyring(KeyPair.from_secret(bytes.fromhex(secret)), trusted)


def make(folder: Path) -> tuple[Keyring, bool]:
    """This machine's keys, made if there are none, and whether they are new. Raises as :func:`load` does."""
    with _locked(folder):
        is_new = not (folder / "secret").exists()
        if is_new:
            _write(folder / "secret", KeyPair.new().secret.hex() + "\n")
        return load(folder), is_new


def trust(folder: Path, name: str, key: str) -> None:
    """Lets the machine that holds the secret of ``key`` (hexadecimal) join runs with this one.

    Raises:
        ConfigError: the name or key is malformed, or the name has another key; and as :func:`load` does.
    """
    key = key.strip().lower()
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:80]!r} is not a name: up to 64 letters, digits, dots, dashes and underscores")
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"'{key[:80]}' is not a key: {2 * KEY_BYTES} hexadecimal digits, as `python -m macft.keys show` prints "
            "them on the other machine"
        )
    with _locked(folder):
        known = load(folder)
        if bytes.fromhex(key) == known.own.public:
            raise ConfigError(f"{key}: this is this machine's own key; type the line on the other machine")
        if known.trusted.get(name, bytes.fromhex(key)) != bytes.fromhex(key):
            raise ConfigError(
                f"{name} is trusted with another key; if it has been set up again, run "
                f"`python -m macft.keys forget {name}` first; if this is another machine, give it another name here"
            )
        _write_trusted(folder, {**known.trusted, name: bytes.fromhex(key)})


def trust_all(folder: Path, keys: Mapping[str, str]) -> list[str]:
    """Trusts all machines, {name: key in hexadecimal}, but this one itself and those that are trusted already.

    A machine whose name another one has here is trusted under a free name, so that neither loses its place.

    Returns:
        A line for each such machine.

    Raises:
        ConfigError: as :func:`trust` does.
    """
    lines = []
    for name, key in keys.items():
        known = load(folder)
        if any(key == member.hex() for member in known.members):
            continue
        free = free_name(name, known.trusted)
        if free != name:
            lines.append(
                f"note: another machine is trusted as {name}, this one now as {free}; if {name} was set up again, "
                f"remove its old key: python -m macft.keys forget {name}"
            )
        trust(folder, free, key)
    return lines


def free_name(name: str, used: Container[str]) -> str:
    """``name``, with a number behind it if it is used."""
    numbered = (name if number == 1 else f"{name[:60]}-{number}" for number in itertools.count(1))
    return next(each for each in numbered if each not in used)


def forget(folder: Path, name: str) -> None:
    """Stops trusting ``name``. Raises ConfigError if it is not trusted, and as :func:`load` does."""
    with _locked(folder):
        trusted = dict(load(folder).trusted)
        if trusted.pop(name, None) is None:
            known = ", ".join(trusted) or "nobody"
            raise ConfigError(f"'{name[:80]}' is not trusted here; trusted: {known}")
        _write_trusted(folder, trusted)


def _write_trusted(folder: Path, trusted: Mapping[str, bytes]) -> None:
    _write(folder / "trusted", "".join(f"{name} {key.hex()}\n" for name, key in sorted(trusted.items())))


def _check_private(path: Path, mode: int) -> None:
    """Raises ConfigError if another user could read or change ``path``."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path}: belongs to another user; keys must be your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        actual = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{path}: others may use it (mode {actual:o}); run `chmod {mode:o} '{path}'`")


def _read(path: Path) -> str:
    _check_private(path, 0o600)
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: more than {_MAX_FILE_BYTES} bytes, so not a file of keys")
    return content.decode("ascii", errors="replace")


def _write(path: Path, text: str) -> None:
    """Replaces a file atomically; only its owner can ever read it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Prevents two commands from changing the files at the same time."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder, 0o700)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{folder}: can't hold keys: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
