"""Hosts of the lab share nothing: no folder, no user, no batch system, no port but SSH's."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from lab import host as below
from lab.centres import Centres, Site, missing_tun
from lab.host import LabError
from lab.machine import PATIENCE_S
from lab.remote import Host, Listener
from worlds.hosts.disk import SmallDisk
from worlds.hosts.leftovers import left_of
from worlds.jobs import until

pytestmark = pytest.mark.slurm
TESTS = Path(__file__).parents[1]
MARK = [sys.executable, "-I", "-S", str(TESTS / "worlds" / "hosts" / "mark.py")]
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), {})"


def reaches(source: Host, address: str, port: int, wait_s: float = 3.0) -> bool:
    code = CONNECT.format(wait_s)
    try:
        source.run(sys.executable, "-I", "-S", "-c", code, address, str(port))
    except LabError:
        return False
    return True


def mark(host: Host, *words: str, user: str = "root") -> Any:
    return json.loads(host.run(*MARK, *words, user=user))


def shared_mounts(writer: Host, reader: Host) -> list[str]:
    """Return what the reader has mounted of what the writer can write to."""
    own = [(dev, part) for dev, part, writable in mark(writer, "mounts").values() if writable]
    return [
        point
        for point, (device, part, _) in mark(reader, "mounts").items()
        for dev, other in own
        if point != "/" and device == dev and os.path.commonpath([part, other]) in (part, other)
    ]


def test_no_two_hosts_share_a_folder(centres: Centres) -> None:
    """Protects every test across centres: none may pass because a file was there already."""
    hosts = list(centres.hosts.values())
    words = {host.name: f"marker-{uuid.uuid4().hex}" for host in hosts}
    written: dict[str, set[str]] = {}
    for host in hosts:
        for user in (host.user, "stranger"):
            assert {"/tmp", f"/home/{user}"} <= set(
                mark(host, "write", f"{words[host.name]}-{user}", user=user)
            )
        written[host.name] = set(mark(host, "write", words[host.name]))
        assert {"/tmp", "/var/tmp", "/home", "/root", "/run", "/dev/shm"} <= written[host.name]
        assert not {"/", "/etc", "/usr", "/var", "/opt", "/srv"} & written[host.name]
        assert set(mark(host, "find", words[host.name])) == written[host.name]
        assert shared_mounts(host, host)  # so that the check is able to fail
    for writer, reader in itertools.permutations(hosts, 2):
        for word in (words[writer.name], f"{words[writer.name]}-{writer.user}"):
            assert mark(reader, "find", word) == [], (writer.name, reader.name)
        # Nor what the machine below shows of it, by its name there or as part of another mount.
        assert shared_mounts(writer, reader) == []
        assert writer.outside(f"/tmp/{words[writer.name]}").exists()
        with pytest.raises(LabError, match="No such file"):
            reader.run("ls", str(writer.place.folder), user="root")


def test_every_host_has_its_own_people(centres: Centres) -> None:
    """Protects the tests of strangers: no account, home or process is seen from elsewhere."""
    ids = [
        number for h in centres.hosts.values() for number in h.place.users.values() if number != 0
    ]
    assert len(ids) == len(set(ids)) == 6
    server, centre = centres["server"], centres["centre_b"]
    assert centre.run("hostname").strip() == "centre_b"
    assert centre.run("id", "-un").strip() == "bob"
    assert centre.run("pwd").strip() == "/home/bob"
    with pytest.raises(LabError, match="no such user"):
        centre.run("id", "sam")
    centre.write("/home/bob/private/file", "words")
    assert centre.run("cat", "/home/bob/private/file") == "words"
    with pytest.raises(LabError, match="Permission denied"):
        centre.run("cat", "/home/bob/private/file", user="stranger")
    waits = centre.popen("sleep", "1234.5")
    until(lambda: "1234.5" in centre.run("ps", "ax"))
    assert "1234.5" not in server.run("ps", "ax", user="root")
    waits.terminate()
    assert waits.wait() != 0


def test_a_cluster_is_reached_from_its_own_host_alone(centres: Centres) -> None:
    """Protects against a site that submits to another centre's batch system."""
    centre = centres["centre_a"]
    assert "idle" in centre.run("sinfo", "-h")
    assert centre.run("srun", "id", "-un").strip() == "ada"
    assert centre.cluster is not None
    login = centre.cluster.layout.login
    assert reaches(centre, login, 6817, PATIENCE_S)
    for other in (centres["server"], centres["centre_b"]):
        assert not reaches(other, login, 6817)
        assert not reaches(other, centre.address, 6817)
        assert other.run("ls", str(below.HOME), user="root").split() == [other.place.folder.name]


def test_connections_go_outward_only(centres: Centres) -> None:
    """Protects what the design promises: nobody has to open a port at a centre."""
    server, centre = centres["server"], centres["centre_b"]
    for host in (server, centre):
        host.popen(sys.executable, "-m", "http.server", "8000", stderr=subprocess.DEVNULL)
        until(lambda host=host: 8000 in [entry.port for entry in host.listening()])
    assert reaches(centre, server.address, 8000, PATIENCE_S)
    assert not reaches(server, centre.address, 8000)
    assert server.run("ssh", centre.name, "hostname").strip() == centre.name
    with pytest.raises(LabError, match="Permission denied"):
        server.run("ssh", "-o", "BatchMode=yes", f"stranger@{centre.name}", "hostname")


def test_all_that_listens_is_listed(centres: Centres) -> None:
    """Protects the tests that compare a host's open ports with the documentation."""
    before = {name: host.listening() for name, host in centres.hosts.items()}
    for name, host in centres.hosts.items():
        slurm = [Listener("0.0.0.0", 6817, "slurmctld")] if host.cluster else []
        assert before[name] == [*slurm, Listener(host.address, 22, "sshd")]
    centre = centres["centre_b"]
    one = "import socket, time; d = socket.create_server(('::1', 4321), family=10); time.sleep(99)"
    centre.popen(sys.executable, "-c", one, user="stranger")
    until(lambda: centre.listening() != before["centre_b"])
    (new,) = set(centre.listening()) - set(before["centre_b"])
    assert (new.address, new.port) == ("::1", 4321)


def test_a_reboot_ends_all_but_the_jobs_on_other_nodes(centres: Centres) -> None:
    """Protects the tests of reboots: what a login node's power cut ends, and what it does not."""
    centre = centres["centre_a"]
    process = centre.popen("setsid", "sleep", "4321.5")
    strange = centre.popen("sleep", "4321.5", user="stranger")
    job = centre.run("sbatch", "--parsable", "--wrap", "sleep 600").strip()
    until(lambda: centre.run("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING")
    until(lambda: centre.run("ps", "ax").count("4321.5") == 2)
    centre.write("/home/ada/kept", "words")
    centre.kill_all()
    assert process.wait() != 0
    assert strange.wait() != 0
    assert "4321.5" not in centre.run("ps", "ax")
    assert centre.run("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING"
    assert centre.run("cat", "/home/ada/kept") == "words"
    assert centres["server"].run("ssh", centre.name, "hostname").strip() == centre.name


def test_a_host_can_have_a_small_disk_of_its_own() -> None:
    """Protects the campaign's full disks: one host's is full, and no other's; it goes with it."""
    if reason := below.missing() or missing_tun():
        pytest.skip(reason)
    name = f"d{os.getpid()}"
    sites = [Site("small", "sam", disk_mb=8), Site("other", "ada", disk_mb=8)]
    with Centres.up(name, sites) as centres:
        small, other = centres.hosts.values()
        disk = SmallDisk(small.place.folder)
        disk.fill()
        with pytest.raises(LabError, match="No space left"):
            small.run("dd", "if=/dev/zero", "of=/home/sam/file", "bs=1", "count=1")
        other.run("dd", "if=/dev/zero", "of=/home/ada/file", "bs=1", "count=1")
        disk.empty()
        small.run("dd", "if=/dev/zero", "of=/home/sam/file", "bs=1", "count=1")
    assert [left for site in sites for left in left_of(f"{name}_{site.name}")] == []


def test_nothing_is_left_when_their_owner_is_killed() -> None:
    """Protects against pytest's end by kill -9: there is no time for any tear-down."""
    if reason := below.missing() or missing_tun():
        pytest.skip(reason)
    name = f"k{os.getpid()}"
    code = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from lab.centres import Centres\n"
        "from dataclasses import replace\n"
        "from lab.centres import CENTRES\n"
        f"world = Centres.up({name!r}, [replace(site, disk_mb=64) for site in CENTRES])\n"
        "world['centre_b'].popen('sleep', '1000')\n"
        "print(*world.hosts, flush=True)\n"
        "time.sleep(3600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folders = [name, *(f"{name}_{host}" for host in owner.stdout.readline().split())]
    assert len(folders) == 4
    assert all(left_of(folder) for folder in folders)
    owner.kill()
    owner.wait()
    until(
        lambda: [left for f in folders for left in left_of(f) if left != str(below.HOME / f)] == []
    )
    below.sweep()  # as whoever makes other hosts may be doing, too
    until(lambda: not [left for folder in folders for left in left_of(folder)])
