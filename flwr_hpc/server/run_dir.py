"""The folder of one run: what lies where, and who may write to it."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
from omegaconf import OmegaConf

from flwr_hpc.config.compose import compose_config, resume_config
from flwr_hpc.config.overrides import split_resume
from flwr_hpc.config.schema import Config, parse
from flwr_hpc.errors import UserError
from flwr_hpc.files import private_folder, publish, read_json, try_lock
from flwr_hpc.gate.credentials import read_credentials
from flwr_hpc.plan.settings import AUTO, with_plan

LEFTOVERS_S = 40.0  # a killed driver's processes are ended by then
_held: dict[Path, int] = {}


@dataclass(frozen=True)
class RunDir:
    """One run's folder.

    ::

        config.yaml     resolved configuration         events.jsonl   every state change
        run.json        run key                        summary.json, report.html
        model/          Hugging Face directory         logs/          one file per process
        jobs/           rendered job scripts           facilities/    local sites' folders
        exchange/       weights in transit             checkpoints/   server state
        flower/         FLWR_HOME and the app bundle   ssh/           sites on other hosts
        lora_A.safetensors  with model.lora.freeze_a
        invitations/    of a server: one file per site     tls/       its certificate
    """

    path: Path

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def frozen_factors(self) -> Path:
        """The A of adapters whose B alone is trained (`model.lora.freeze_a`)."""
        return self.path / "lora_A.safetensors"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exchange(self) -> Path:
        return self.path / "exchange"

    @property
    def flower(self) -> Path:
        return self.path / "flower"

    @property
    def key(self) -> str:
        """Names the run in order ids and job names; the same after a resume."""
        raw = read_json(self.path / "run.json")
        if raw is None:
            raise UserError(f"{self.path} is not a run directory: it holds no run.json")
        return str(raw["run_key"])

    @property
    def certificate(self) -> Path:
        """What sites of other centres trust; its private key is beside it."""
        return self.path / "tls" / "certificate.pem"

    @property
    def certificate_key(self) -> Path:
        return self.certificate.with_name("private_key.pem")

    @property
    def credentials(self) -> Path:
        """Which sites of other centres may come in, see `flwr_hpc.gate.credentials`."""
        return self.invitations / "credentials.json"

    @property
    def invitations(self) -> Path:
        return self.path / "invitations"

    @property
    def ssh(self) -> Path:
        """What is known of the sites on other hosts."""
        return self.path / "ssh"

    def sites(self, config: Config) -> list[str]:
        """Return the names of all that train: own facilities, and who is invited and not out."""
        invited = read_credentials(self.credentials)
        out = {site for site, credential in invited.items() if credential.revoked}
        return [site for site in dict.fromkeys([*config.facilities, *invited]) if site not in out]

    def config(self) -> Config:
        """Load the resolved configuration."""
        return parse(OmegaConf.load(self.path / "config.yaml"))  # type: ignore[arg-type]

    def resumed_config(self, overrides: Sequence[str]) -> Config:
        """Load the configuration to go on with, after changes as they are typed."""
        config = resume_config(self.path / "config.yaml", list(overrides))
        config.resume = str(self.path)
        return config

    def write_config(self, config: Config) -> None:
        publish(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))

    @property
    def server_file(self) -> Path:
        """Where the ServerApp says which process it is."""
        return self.flower / "server.json"

    def site_file(self, facility: str) -> Path:
        """Where the settings of a facility's site lie."""
        return self.flower / f"site-{facility}.json"

    def store_url(self, config: Config, run_key: str | None = None) -> str:
        """Where weights lie on their way; this run's alone."""
        if config.exchange.store:
            return f"{config.exchange.store.rstrip('/')}/{run_key or self.key}"
        return f"file://{self.exchange}"

    def site_root(self, config: Config, facility: str, run_key: str | None = None) -> Path:
        """The site's folder on the facility's shared file system."""
        workdir = config.facilities[facility].workdir
        if workdir is None:
            return self.path / "facilities" / facility
        return Path(workdir).expanduser() / "flwr-hpc" / (run_key or self.key) / facility

    @classmethod
    def create(cls, config: Config) -> RunDir:
        """Make a new run's folder: ``runs/<date>_<time>`` or `config.run_dir`."""
        now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        path = Path(config.run_dir or f"runs/{now}").expanduser().absolute()
        for attempt in range(1, 100):  # two runs started in the same second
            if config.run_dir or not path.exists():
                break
            path = path.with_name(f"{now}_{attempt + 1}")
        if (path / "run.json").exists():
            raise UserError(
                f"run_dir={path} already holds a run. Continue it with: resume={path}, "
                "or name another folder."
            )
        run = cls(path)
        try:
            for folder in (path, run.logs, run.jobs, run.flower):
                private_folder(folder)
            key = f"{now.replace('_', '-')}-{secrets.token_hex(2)}"
            run.write_config(config)
            publish(path / "run.json", json.dumps({"run_key": key, "created": now}))
        except OSError as exc:
            raise UserError(f"the run directory {path} cannot be written: {exc}") from None
        return run

    @classmethod
    def open(cls, path: str) -> RunDir:
        """Open an existing run's folder."""
        run = cls(Path(path).expanduser().absolute())
        if not (run.path / "run.json").exists() or not (run.path / "config.yaml").exists():
            raise UserError(
                f"{run.path} is not a run directory (no run.json and config.yaml there). "
                "Name the folder that the run printed, e.g. resume=runs/2026-01-31_12-00-00"
            )
        private_folder(run.path)
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for one driver, and for what a killed one has left until it has ended."""
        path = self.path / "lock"
        deadline = time.monotonic() + LEFTOVERS_S
        with open(path, "a+") as f:
            while not try_lock(f):
                if psutil.pid_exists(_driver(path)) or time.monotonic() > deadline:
                    raise UserError(f"{self.path} is in use by another flwr_hpc.run")
                time.sleep(0.5)
            f.truncate(0)
            f.write(str(os.getpid()))
            f.flush()
            _held[self.path] = f.fileno()
            try:
                yield
            finally:
                del _held[self.path]

    def in_use(self) -> bool:
        """Tell whether a driver, or what one has left, is at work here."""
        path = self.path / "lock"
        if not path.exists():
            return False
        with open(path, "a+") as f:
            return not try_lock(f)

    def driver(self) -> int:
        """Return the number of the process that holds the run, or held it last; 0: none."""
        path = self.path / "lock"
        return _driver(path) if path.exists() else 0

    def lock_fd(self) -> int:
        """Return the descriptor of the lock that this process holds."""
        return _held[self.path]


def _driver(lock: Path) -> int:
    text = lock.read_text().strip()
    return int(text) if text.isdigit() else 0


def configure(
    overrides: Sequence[str], config_dir: str | None, serve: bool = False
) -> tuple[Config, bool]:
    """Compose the configuration; a resumed run's comes from its folder. Return whether it does.

    A new run's plan is made here, and shown on stderr: the run's folder has what was chosen.
    """
    folder, changes = split_resume(overrides)
    if folder:
        return RunDir.open(folder).resumed_config(changes), True
    config = compose_config(overrides, config_dir, serve=serve)
    if config.train.plan == AUTO:
        config, line = with_plan(config, overrides)
        print(line, file=sys.stderr)
    return config, False
