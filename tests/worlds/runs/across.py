"""One training by hosts of the lab that share nothing: its run directory, its sites, its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lab.centres import Centres
from lab.place import TEMPLATES
from lab.remote import Host, Process
from numpy.typing import NDArray
from safetensors.numpy import load_file
from worlds.files import paths_under
from worlds.jobs import until
from worlds.runs.run import SMALL, Run, trained_steps

from flwr_hpc.files import read_json
from flwr_hpc.tracking.events import read

# As SMALL, but who trains is up to the sites.
SETTINGS = [s for s in SMALL if "local_" not in s and not s.startswith("train.steps=")]
DATA = {"centre_a": "json", "centre_b": "logging", "centre_c": "unittest"}
SHELL = ("bash", "-c", '[ ! -f ~/.bashrc ] || . ~/.bashrc; exec "$@"', "bash")  # a person's

Tensors = dict[str, NDArray[np.float32]]


def on_one_host(folder: Path, *settings: str, sites: Sequence[str] = tuple(DATA)[:2]) -> Tensors:
    """Return the weights that the same training comes to on one host, by `run`."""
    (folder / "conf" / "facility").mkdir(parents=True)
    own = []
    for name in sites:
        text = TEMPLATES.get_template("facility_local.yaml.j2").render(name=name)
        (folder / "conf" / "facility" / f"{name}.yaml").write_text(text)
        own.append(f"data.paths.{name}=[{DATA[name]}]")
    where = [f"--config-dir={folder}/conf", f"+facility=[{','.join(sites)}]"]
    run = Run(folder / "run", *where, *own, *settings, settings=SETTINGS)
    assert run.end() == 0, run.said()
    return trained(folder / "run" / "model")


def trained(model: Path) -> Tensors:
    """Return the weights, or the adapter's, of a model directory."""
    (path,) = model.glob("*model.safetensors")
    tensors: Tensors = load_file(path)
    return tensors


class Across:
    """A run directory on the first host, and sites on the others.

    Parameters
    ----------
    centres : Centres
    logs : Path
        Where what the commands print goes, one file per host.
    settings : str
        Of the run, further ones.
    """

    def __init__(self, centres: Centres, logs: Path, *settings: str) -> None:
        self.server, *self.sites = centres.hosts.values()
        self.run_dir = f"/home/{self.server.user}/run"
        self.logs, self.settings = logs, settings
        self.commands: dict[str, Process] = {}  # by host

    def home(self, site: Host) -> str:
        """Return the folder of a site that holds its files."""
        raise NotImplementedError

    def path(self, name: str) -> Path:
        """Return where a file of the run directory lies on the machine below."""
        return self.server.outside(f"{self.run_dir}/{name}")

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.path("events.jsonl")
        events = read(path) if path.exists() else []  # a torn line is none
        return [event for event in events if event["event"] == name]

    def files(self, site: Host, name: str) -> list[Path]:
        """Return the files of a name at a site."""
        return [p for p in paths_under(site.outside(self.home(site))) if p.name == name]

    def orders(self, site: Host) -> list[int]:
        """Return the versions of the training orders that a site works or has worked on."""
        found = (read_json(path) for path in self.files(site, "order.json"))
        orders = (value["order"] for value in found if value)  # else: pruned
        return [order["version"] for order in orders if order["kind"] == "train"]

    def allocations(self, site: Host) -> list[str]:
        """Return the jobs that a site has ever submitted."""
        return sorted(path.parent.name for path in self.files(site, "job"))

    def until(self, what: Any, pause_s: float = 0.2) -> Any:
        """Poll until something is true, as long as anything moves at any host."""
        homes = [host.outside(f"/home/{host.user}") for host in (self.server, *self.sites)]

        def look() -> Any:
            found = what()
            codes = {name: process.poll() for name, process in self.commands.items()}
            over = any(codes.values()) or None not in codes.values()
            assert found or not over, f"the commands have ended, {codes}:\n{self.said()}"
            return found

        return until(look, *homes, self.logs, explain=self.said, pause_s=pause_s)

    def ends_like(self, alone: Tensors, steps: int) -> None:
        """Wait for the end: the weights are those of one host, and nothing is left.

        Each site has trained `steps` steps, by its own count, and was taken to have.
        """
        for process in list(self.commands.values()):
            self.until(lambda process=process: process.poll() is not None)  # type: ignore[misc]
            assert process.returncode == 0, self.said()
        summary = read_json(self.path("summary.json")) or {}
        for site in self.sites:
            own = trained_steps(site.outside(self.home(site)))
            assert (own, summary["facilities"][site.name]["steps"]) == (steps, steps)
        found = trained(self.path("model"))
        assert found.keys() == alone.keys()
        assert [name for name in alone if not np.array_equal(found[name], alone[name])] == []
        for host in (self.server, *self.sites):  # who is killed takes a moment
            until(lambda host=host: not living(host, "flwr"))  # type: ignore[misc]

    def said(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()[-4000:]}" for p in self.logs.glob("*.out"))

    def type(self, host: Host, *words: str) -> None:
        """Give one of our commands as a host's user."""
        with open(self.logs / f"{host.name}.out", "ab") as out:
            command = (*SHELL, "python", "-m", *words)
            self.commands[host.name] = host.popen(
                *command, env={"OMP_NUM_THREADS": "1"}, stdin=-3, stdout=out, stderr=out
            )

    def reboot(self, host: Host) -> None:
        """Kill -9 all that runs on a host, at once; what it was told to do is to be told again."""
        host.kill_all()
        command = self.commands.pop(host.name, None)
        assert command is None or command.wait() != 0


def living(host: Host, word: str) -> list[str]:
    """Return the commands of a host's user that hold a word; one that has ended is none."""
    lines = host.run("ps", "-U", host.user, "-o", "stat=", "-o", "args=").splitlines()
    return [line for line in lines if word in line and not line.startswith("Z")]
