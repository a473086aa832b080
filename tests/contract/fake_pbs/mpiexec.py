"""An mpiexec of one host: Hydra's with -ppn, Open MPI's with --map-by."""

import os
import subprocess
import sys
import time


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
        ranks.append(subprocess.Popen(args, env=env))
    while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
        time.sleep(0.03)
    for rank in ranks:
        rank.kill()
    sys.exit(max(abs(r.wait()) for r in ranks))
