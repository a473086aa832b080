"""A host of the lab that is a PBS centre: the commands of the fake, and its facility's file."""

from __future__ import annotations

from pathlib import Path

from lab.remote import Host
from worlds.jobs import fake_pbs

FACILITY = """# @package facilities.{name}
scheduler: pbs
account: null
ranks_per_node: 1
walltime: "00:30:00"
poll_s: 2
"""


def bring_pbs(host: Host) -> None:
    """Let a host's user submit to PBS, as a login shell there finds it."""
    home = Path(f"/home/{host.user}/pbs")
    for path, text in fake_pbs(home).items():
        host.write(str(path), text, mode=0o700)
    host.write(f"/home/{host.user}/.bashrc", f'PATH="{home}/bin:$PATH"\nexport FAKE_PBS={home}\n')
    host.write(f"/home/{host.user}/conf/facility/{host.name}.yaml", FACILITY.format(name=host.name))
