"""An mpiexec of one host: Hydra's with -ppn, Open MPI's with --map-by.

With ``-launcher-exec`` it starts the ranks by that program with each word in quotes, as Debian's
MPICH 4.0.2 was seen to with pbs_tmrsh (2026-11-21), and reads the hosts from ``-f``.
"""

import os
import subprocess
import sys
import time
from pathlib import Path


def mpiexec(args):
    options = {}
    while args[0].startswith("-"):
        options[args[0]] = args[1]
        args = args[2:]
    size = int(options["-n"])
    per_node = int(options.get("-ppn") or options["--map-by"].split(":")[1])
    ranks = []
    for rank in range(size):
        local = str(rank % per_node)
        hydra = {"PMI_RANK": str(rank), "PMI_SIZE": str(size), "MPI_LOCALRANKID": local}
        ompi = {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": str(size),
            "OMPI_COMM_WORLD_LOCAL_RANK": local,
        }
        env = {**os.environ, **(hydra if "-ppn" in options else ompi)}
        command = args
        if "-launcher-exec" in options:
            host = Path(options["-f"]).read_text().split()[0]
            command = [options["-launcher-exec"], host, *(f'"{word}"' for word in args)]
        ranks.append(subprocess.Popen(command, env=env))
    while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
        time.sleep(0.03)
    for rank in ranks:
        rank.kill()
    sys.exit(max(abs(r.wait()) for r in ranks))


def pbs_tmrsh(args):
    """Run a command on a host of the job, word by word: no shell reads it."""
    os.execvp(args[1], args[1:])
