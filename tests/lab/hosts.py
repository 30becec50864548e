"""Hosts in the small: each with its own network, process ids, hostname and shared memory, reached by ssh.

They are Linux namespaces of this one machine: the file system is shared, as it would be over NFS. The hosts'
links end at a bridge in a further namespace, `head`, where launchers are started. No namespace has a way out,
and the addresses exist in them alone, so that several labs do not meet.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_NETWORK = "10.77.0"
_HEAD = 254
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_PROGRAMS = ("ip", "unshare", "setpriv", "mount", "ssh", "sshd", "ssh-keygen", "pdsh")
_ISOLATE = "unshare --fork --kill-child --pid --uts --ipc --mount --mount-proc".split()

_SSHD_CONF = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""

# The keepalive ends an ssh whose host is gone: without it pdsh, and the launcher above it, wait for hours.
_SSH_CONF = """\
Host *
  User root
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 2
"""

# Run inside a host's namespaces: names, an own shared memory, the folder that sshd wants, then sshd itself.
_BOOT = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount -t tmpfs tmpfs /dev/shm &&
mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "$3" -D -e -f "$2/sshd_config"
"""


def hosts_missing() -> str:
    """Why this machine cannot run the lab, as one sentence; empty if it can."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: iproute2 openssh-server openssh-client pdsh)"
    name = f"mv-{secrets.token_hex(3)}"
    if (tried := _ip("netns", "add", name, check=False)).returncode:
        return f"this kernel or container refuses network namespaces: {tried.stderr.strip()}"
    tried = _ip("netns", "exec", name, *_ISOLATE, "true", check=False)
    _ip("netns", "delete", name, check=False)
    return f"no process or mount namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class HostsLab:
    """`count` hosts h1, h2, ... at 10.77.0.1, 10.77.0.2, ..., with sshd, and a head that reaches them all.

    Args:
        folder: an empty folder for keys, configuration and logs; the hosts see it under the same path.
        count: number of hosts.

    Every process of a host and of the head ends with the lab. The head's have ordinary process ids
    (`Popen.pid`); a host's have two, of which `pids` gives the outer ones.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder = folder.resolve()
        self.hosts = [f"h{i}" for i in range(1, count + 1)]
        self.addresses = {host: f"{_NETWORK}.{i}" for i, host in enumerate(self.hosts, 1)}
        self._lab = f"mv-{secrets.token_hex(3)}"
        self._spaces: list[str] = []
        self._booted: list[subprocess.Popen[bytes]] = []
        self._daemons: set[int] = set()

    def __enter__(self) -> HostsLab:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def head(
        self, command: Sequence[str | Path], env: dict[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Starts `command` on the head, with `env` added to the environment; ssh and pdsh know the hosts.

        Further arguments go to Popen. It leads a process group, so that one can signal the whole of it.
        """
        inside = 'mount --bind "$0" /etc/hosts && exec "$@"'
        words = [*self._exec("head"), "bash", "-c", inside, str(self.folder / "hosts"), *map(str, command)]
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{_PATH}"
        environment = os.environ | {"PATH": path, "PDSH_RCMD_TYPE": "ssh"} | (env or {})
        return subprocess.Popen(words, env=environment, start_new_session=True, **popen)

    def run(
        self, *command: str | Path, timeout_s: float = 60, **popen: Any
    ) -> subprocess.CompletedProcess[str]:
        """A command on the head, to its end; check `returncode` yourself."""
        process = self.head(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def hostfile(self, slots: int) -> Path:
        """A hostfile for `deepspeed --hostfile` with `slots` ranks on each host."""
        path = self.folder / f"hostfile-{slots}"
        path.write_text("".join(f"{host} slots={slots}\n" for host in self.hosts))
        return path

    def cut(self, host: str) -> None:
        """Pulls the host's cable at the bridge: nothing arrives and nobody is told, on neither side."""
        _ip("-n", self._name("head"), "link", "set", host, "down")

    def restore(self, host: str) -> None:
        """Puts the cable back; open connections go on."""
        _ip("-n", self._name("head"), "link", "set", host, "up")

    def pids(self, host: str, command: str = "") -> list[int]:
        """The processes of a host (or of `head`) whose command line contains `command`: their outer ids."""
        found = []
        for word in _ip("netns", "pids", self._name(host), check=False).stdout.split():
            with suppress(OSError):  # it has just ended
                words = Path(f"/proc/{word}/cmdline").read_bytes().split(b"\0")
                if any(words) and command in b" ".join(words).decode(errors="replace"):  # a zombie has none
                    found.append(int(word))
        return found

    def clear(self) -> None:
        """Connects all hosts again and ends what runs on them and on the head, but for sshd."""
        for host in self.hosts:
            self.restore(host)
        self._kill_all_but(self._daemons)

    def stop(self) -> None:
        """Ends all processes of the lab and removes its namespaces."""
        for process in self._booted:
            process.kill()  # and with it, by --kill-child, the host's first process, so all of its processes
            process.wait()
        self._booted.clear()
        self._kill_all_but(set())
        for space in self._spaces:
            _ip("netns", "delete", self._name(space), check=False)
        self._spaces.clear()

    def _start(self) -> None:
        self._write_files()
        self._add_space("head")
        _ip("-n", self._name("head"), "link", "add", "br0", "type", "bridge")
        _ip("-n", self._name("head"), "address", "add", f"{_NETWORK}.{_HEAD}/24", "dev", "br0")
        _ip("-n", self._name("head"), "link", "set", "br0", "up")
        for host, address in self.addresses.items():
            self._add_space(host)
            head, own = self._name("head"), self._name(host)
            _ip("link", "add", host, "netns", head, "type", "veth", "peer", "name", "eth0", "netns", own)
            _ip("-n", head, "link", "set", host, "master", "br0", "up")
            _ip("-n", own, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", own, "link", "set", "eth0", "up")
            self._boot(host)
        self._wait_for_ssh()
        self._daemons = {pid for host in self.hosts for pid in self.pids(host, "sshd")}

    def _write_files(self) -> None:
        (self.folder / "bin").mkdir(parents=True)
        for name in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(command, check=True)
        (self.folder / "sshd_config").write_text(_SSHD_CONF.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(_SSH_CONF.format(folder=self.folder))
        names = {"localhost": "127.0.0.1", **self.addresses, "head": f"{_NETWORK}.{_HEAD}"}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        wrapper = self.folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def _boot(self, host: str) -> None:
        """Starts the host's sshd as process 1 of its namespaces; all end with this Popen, and it with us."""
        sshd = shutil.which("sshd", path=_PATH)
        words = ["setpriv", "--pdeathsig", "KILL", *self._exec(host), *_ISOLATE, "bash", "-c", _BOOT, "boot"]
        with (self.folder / f"{host}.log").open("wb") as log:
            self._booted.append(
                subprocess.Popen(
                    [*words, host, str(self.folder), str(sshd)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _wait_for_ssh(self, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        for host, process in zip(self.hosts, self._booted, strict=True):
            while (answer := self.run("ssh", host, "true")).returncode:
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (self.folder / f"{host}.log").read_text()
                    raise RuntimeError(f"host {host} does not answer: {answer.stderr}\n{log}")
                time.sleep(0.05)

    def _kill_all_but(self, spared: set[int], timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while left := {pid for space in self._spaces for pid in self.pids(space)} - spared:
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {left} of the lab do not end")
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _add_space(self, space: str) -> None:
        _ip("netns", "add", self._name(space))
        self._spaces.append(space)
        _ip("-n", self._name(space), "link", "set", "lo", "up")

    def _name(self, space: str) -> str:
        return f"{self._lab}-{space}"

    def _exec(self, space: str) -> list[str]:
        return [shutil.which("ip", path=_PATH) or "ip", "netns", "exec", self._name(space)]


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([shutil.which("ip", path=_PATH) or "ip", *words], text=True, capture_output=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done
