"""What a cluster is made of, as pure functions: its files, and the steps that boot its nodes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .place import HERE, TEMPLATES, Place, place_files, place_steps, sshd

CONTROLLER, NODE, DATABASE = 6817, 6818, 6819


@dataclass(frozen=True)
class Shape:
    """How large a cluster is and how it behaves.

    Attributes
    ----------
    nodes, cpus, memory_mb, gpus : int
        Nodes, and what each of them has; GPUs are stand-ins (``/dev/null``).
    accounting : bool
        Run slurmdbd and MariaDB: sacct works and accounts are enforced.
    ssh : bool
        Run sshd on the login node.
    slurmd_timeout_s : int
        A node that does not answer for so long is down.
    message_timeout_s : int
        A daemon that does not answer a message for so long has not got it.
    cred_expire_s : int
        A requeued job waits for so long; what is to start a job must be with slurmd by then.
    min_job_age_s : int
        squeue knows an ended job for so long.
    grace_s : int
        A preempted job may go on for so long.
    user : str
        Unix user with the account ``lab``, beside root.
    """

    nodes: int = 1
    cpus: int = 2
    memory_mb: int = 4000
    gpus: int = 0
    accounting: bool = True
    ssh: bool = False
    slurmd_timeout_s: int = 30
    message_timeout_s: int = 10
    cred_expire_s: int = 20
    min_job_age_s: int = 300
    grace_s: int = 0
    user: str = "root"


@dataclass(frozen=True)
class Layout:
    """A cluster in its place.

    Attributes
    ----------
    name : str
    folder : Path
    index : int
        Which of the 512 networks 198.18.0.0/24 to 198.19.255.0/24 it has; RFC 2544 keeps that
        range for laboratories.
    shape : Shape
    place : Place, optional
        Where the login node is a host that shares nothing with others.
    """

    name: str
    folder: Path
    index: int
    shape: Shape
    place: Place | None = None

    def address(self, host: int) -> str:
        return f"198.{18 + self.index // 256}.{self.index % 256}.{host}"

    @property
    def login(self) -> str:
        return self.address(1)

    @property
    def login_name(self) -> str:
        return self.place.name if self.place else f"{self.name}-login"

    @property
    def outside(self) -> str:
        """Return the host's own address in the cluster's network; only the login node sees it."""
        return self.address(254)

    @property
    def nodes(self) -> list[dict[str, str]]:
        return [
            {"name": f"{self.name}-n{k}", "address": self.address(10 + k)}
            for k in range(1, self.shape.nodes + 1)
        ]

    def render(self, template: str, name: str = "") -> str:
        return TEMPLATES.get_template(template).render(
            name=name or self.name,
            folder=self.folder,
            login=self.login,
            login_name=self.login_name,
            nodes=self.nodes,
            shape=self.shape,
        )


def files(layout: Layout) -> dict[str, str]:
    """Return the cluster's files by their path in its folder."""
    shape = layout.shape
    found = {
        "slurm.conf": layout.render("slurm.conf.j2"),
        "cgroup.conf": "CgroupPlugin=cgroup/v1\n",  # v2 would want a cgroup of its own
        "hosts": layout.render("hosts.j2"),
    }
    if shape.gpus:
        found["gres.conf"] = f"Name=gpu File={layout.folder}/dev/nvidia[0-{shape.gpus - 1}]\n"
    if shape.accounting:
        found["slurmdbd.conf"] = layout.render("slurmdbd.conf.j2")
        found["accounts.cfg"] = layout.render("accounts.cfg.j2")
    if shape.ssh:
        found |= {n: layout.render(f"{n}.j2") for n in ("sshd_config", "ssh_config")}
    for node in layout.nodes:
        found[f"{node['name']}.json"] = json.dumps(node_plan(layout, node["name"]))
    if layout.place:
        names = found.pop("hosts")
        found |= place_files(layout.place)
        found["etc/hosts"] = names + found["etc/hosts"]
    return found


def login_plan(layout: Layout, keep: bool) -> dict[str, Any]:
    """Return what process 1 of the login node has to do."""
    folder, shape = layout.folder, layout.shape
    environment = f"SetEnv=SLURM_CONF={folder}/slurm.conf"
    ours = [
        _run("mount", "-t", "tmpfs", "tmpfs", "/run"),
        _run("mkdir", "-p", "/run/sshd", "/run/netns"),
        _run("mount", "--bind", f"{folder}/hosts", "/etc/hosts"),
    ]
    steps = [
        *(place_steps(layout.place) if layout.place else ours),
        *_network(layout),
        *_gpus(layout),
        _munged(layout),
        *(_ssh(layout) if shape.ssh else []),
        *(_accounting(layout) if shape.accounting else []),
        _start(layout, "slurmctld", ["slurmctld", "-D"], {"tcp": [layout.login, CONTROLLER]}),
        *(_node(layout, node["name"]) for node in layout.nodes),
        *(sshd(layout.place, "-o", environment) if layout.place else []),
    ]
    return {
        "hostname": layout.login_name,
        "folder": str(folder),
        "control": f"{folder}/control",
        "remove": not layout.place,  # see place_plan
        "keep": keep,
        "mounts": [f"{folder}/db"] if shape.accounting else [],
        "steps": steps,
        "reboots": ["sshd"] if layout.place else [],
    }


def node_plan(layout: Layout, node: str) -> dict[str, Any]:
    """Return what process 1 of a compute node has to do."""
    (address,) = (n["address"] for n in layout.nodes if n["name"] == node)
    slurmd = _start(layout, "slurmd", ["slurmd", "-D"], {"tcp": [address, NODE]})
    slurmd["log"] = f"{layout.folder}/log/{node}.out"
    return {
        "hostname": node,
        "folder": str(layout.folder),
        "control": f"{layout.folder}/{node}.control",
        "steps": [slurmd],
    }


def _run(*argv: str, stdin: str = "") -> dict[str, Any]:
    return {"run": list(argv), "stdin": stdin}


def _start(
    layout: Layout, name: str, argv: list[str], ready: dict[str, Any], **more: Any
) -> dict[str, Any]:
    log = f"{layout.folder}/log/{name}.out"
    env = {"SLURM_CONF": f"{layout.folder}/slurm.conf", **more.pop("env", {})}
    return {"start": name, "argv": argv, "log": log, "ready": ready, "env": env, **more}


def _network(layout: Layout) -> list[dict[str, Any]]:
    """Return the steps that connect the nodes; only the login node has a way to the host."""
    login = [
        "link set lo up",
        # The host's end is `layout.outside`; a route to it alone, none further.
        f"addr add {layout.login} peer {layout.outside} dev wan",
        "link set wan up",
        "link add br0 type bridge",
        f"addr add {layout.login}/24 dev br0",
        "link set br0 up",
    ]
    nodes = []
    for k, node in enumerate(layout.nodes):
        name = node["name"]
        login += [
            f"netns add {name}",
            f"link add v{k} type veth peer name eth0 netns {name}",
            f"link set v{k} master br0 up",
        ]
        inside = ["link set lo up", f"addr add {node['address']}/24 dev eth0", "link set eth0 up"]
        nodes.append(_run("ip", "-n", name, "-batch", "-", stdin="\n".join(inside)))
    return [_run("ip", "-batch", "-", stdin="\n".join(login)), *nodes]


def _gpus(layout: Layout) -> list[dict[str, Any]]:
    """Return the steps that make stand-ins for GPUs; mknod is not allowed in every container."""
    files = [f"{layout.folder}/dev/nvidia{k}" for k in range(layout.shape.gpus)]
    return [_run("sh", "-c", f": > {file} && mount --bind /dev/null {file}") for file in files]


def _munged(layout: Layout) -> dict[str, Any]:
    home = layout.folder / "munge"
    argv = ["munged", "--foreground", "--force", f"--socket={home}/socket"]
    argv += [f"--key-file={home}/key", f"--pid-file={home}/pid", f"--seed-file={home}/seed"]
    argv += [f"--log-file={layout.folder}/log/munged.log"]
    return _start(layout, "munged", argv, {"socket": f"{home}/socket"})


def _ssh(layout: Layout) -> list[dict[str, Any]]:
    home = layout.folder / "ssh"
    keys = [
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{home}/{key}")
        for key in ("host", "client")
    ]
    known = f'echo "{layout.name} $(cut -d" " -f1,2 {home}/host.pub)" > {home}/known_hosts'
    argv = ["/usr/sbin/sshd", "-D", "-f", f"{layout.folder}/sshd_config", "-e"]
    return [
        *keys,
        _run("sh", "-c", known),
        _start(layout, "sshd", argv, {"tcp": [layout.login, 22]}),
    ]


def _accounting(layout: Layout) -> list[dict[str, Any]]:
    """Return the steps to a slurmdbd over a MariaDB in memory, with the cluster's accounts."""
    folder, conf = layout.folder, f"SLURM_CONF={layout.folder}/slurm.conf"
    place = ["--no-defaults", "--user=root", f"--datadir={folder}/db", f"--tmpdir={folder}/db"]
    place += ["--innodb-log-file-size=4M", "--innodb-buffer-pool-size=32M"]
    install = ["mariadb-install-db", *place, "--auth-root-authentication-method=socket"]
    install += ["--auth-root-socket-user=root", "--skip-test-db", "--skip-name-resolve"]
    server = ["mariadbd", *place, "--skip-networking", "--skip-log-bin", "--performance-schema=off"]
    server += [f"--socket={folder}/run/db.socket", f"--pid-file={folder}/run/db.pid"]
    server += ["--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"]
    ping = ["mariadb-admin", "--no-defaults", f"--socket={folder}/run/db.socket", "ping"]
    where = {"env": {"MYSQL_UNIX_PORT": f"{folder}/run/db.socket"}}
    ready = {"tcp": [layout.login, DATABASE]}
    return [
        _run("mount", "-t", "tmpfs", "tmpfs", f"{folder}/db"),
        _run(*install),
        _start(layout, "mariadbd", server, {"command": ping}),
        _start(layout, "slurmdbd", ["slurmdbd", "-D"], ready, **where),
        _run("env", conf, "sacctmgr", "-i", "load", f"{folder}/accounts.cfg"),
    ]


def _node(layout: Layout, name: str) -> dict[str, Any]:
    spaces = ["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"]
    argv = ["nsenter", f"--net=/run/netns/{name}", "unshare", *spaces]
    argv += [sys.executable, "-I", "-S", str(HERE / "init.py"), f"{layout.folder}/{name}.json"]
    return _start(layout, name, argv, {"socket": f"{layout.folder}/{name}.control"}, node=True)
