"""Checks on the compute nodes: pure functions of what the probe job brought back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr_hpc import __version__
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.doctor.findings import Checks, Finding, failed, passed, skipped, warned
from flwr_hpc.doctor.job import ProbeResult
from flwr_hpc.doctor.login import duration, mend_refusal
from flwr_hpc.plan.bandwidth import MeasuredBandwidths, MeasuredRow

NODES = "compute nodes"
NEEDED = ("torch", "transformers", "peft", "datasets")
JOB, BANDWIDTHS = "probe job", "bandwidths"
CLOCK_WARN_S, CLOCK_FAIL_S = 5.0, 60.0
SLOW_FILES_S = 10.0
LEAST_TMP = 10**9
MEMORY_SLACK = 0.93  # drivers keep some, and vendors count in GB or GiB


@dataclass(frozen=True)
class Nodes:
    """What the checks of one facility look at."""

    name: str  # Of the facility
    probed: ProbeResult
    here: Mapping[str, str]  # Versions of the packages of the login node

    @property
    def facility(self) -> FacilityConfig:
        return self.probed.facility

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [report for _, report in sorted(self.probed.reports.items())]

    @property
    def hosts(self) -> dict[str, list[dict[str, Any]]]:
        """The reports by node."""
        found = defaultdict(list)
        for report in self.reports:
            found[str(report["host"])].append(report)
        return dict(found)

    @property
    def bandwidths(self) -> MeasuredBandwidths | None:
        """What the ranks measured together, as plans take it; None if they did not."""
        first = self.reports[0] if self.reports else {}
        measured, f = first.get("bandwidth"), self.facility
        if not measured or "error" in measured:
            return None
        return MeasuredBandwidths(
            self.name, self.probed.date, first["packages"]["torch"], measured["device"],
            list(self.hosts), f.ranks_per_node, f.gpus_per_node,
            [MeasuredRow(**row) for row in measured["rows"]],
        )  # fmt: skip

    def set(self, field: str) -> str:
        """Return a field of the facility as it is set on the command line."""
        return f"facilities.{self.name}.{field}"


nodes: Checks[Nodes] = Checks(NODES)


@nodes(JOB)
def job(there: Nodes) -> Finding:
    """See whether the job ran to its end in every rank."""
    probed, f = there.probed, there.facility
    world = f.nodes * f.ranks_per_node
    if len(probed.reports) == world:
        shape = f"{world} ranks on {', '.join(there.hosts)}"
        return passed(f"job {probed.job_id}: {shape}, began {duration(probed.waited_s or 0)} after "
                      "submission")  # fmt: skip
    fault = probed.fault or "interrupted"
    if not probed.job_id:
        return failed(fault, mend_refusal(there.name, f, fault))
    if probed.waited_s is None and not probed.log and "ended" not in fault:
        return failed(f"job {probed.job_id}: {fault}", _mend_queue(there))
    missing = sorted(set(range(world)) - set(probed.reports))
    found = f"job {probed.job_id}: {fault}; no report of rank {', '.join(map(str, missing))}"
    return failed(f"{found}\n{probed.log}".strip(), _mend_start(there))


def _mend_queue(there: Nodes) -> str:
    if "will not start" in there.probed.fault:
        return mend_refusal(there.name, there.facility, there.probed.fault)
    return (
        f"wait longer: --timeout 120 (minutes); or a debug queue: {there.set('partition')}=NAME or "
        f"{there.set('qos')}=NAME"
    )


def _mend_start(there: Nodes) -> str:
    """Return what to do about ranks that said nothing, by what they wrote to stderr."""
    log, f = there.probed.log, there.facility
    where = "container" if f.container else "Python of the jobs"
    if "No module named" in log:
        return (
            f"install flwr-hpc[train] where the {where} finds it, or name another: "
            f"{there.set('container' if f.container else 'python')}=PATH"
        )
    if "exec format error" in log.lower():
        return f"compute nodes have other processors: {there.set('python')}=PATH of one built there"
    if "No such file" in log or "not found" in log or "execve" in log:
        return (
            f"something named in the script is not on the compute nodes: {there.set('python')}, "
            f"{there.set('container')}, {there.set('setup')}, or the working folder"
        )
    if not log:
        return (
            "not even a log file came back: the working folder is not the same on the compute "
            f"nodes. {there.set('workdir')}=/path/on/the/shared/file/system"
        )
    return "see the ranks' last words"


@nodes("shared files", needs=[JOB])
def files(there: Nodes) -> Finding:
    """See whether files of the login node were seen, also those written while the job ran."""
    probed = there.probed
    fix = f"{there.set('workdir')}=/path/on/the/shared/file/system"
    if any(report.get("token") != probed.token for report in there.reports):
        return failed("compute nodes see another folder of this name", fix)
    blind = [str(report["rank"]) for report in there.reports if not report["ping"]]
    if blind:
        return failed(f"a new file was not seen for minutes by rank {', '.join(blind)}", fix)
    slowest = max(probed.round_trip_s.values(), default=0.0)
    found = f"a file there and one back in {slowest:.1f} s at most"
    if slowest > SLOW_FILES_S:
        return warned(
            f"{found}: every order and result waits that long",
            f"a file system with less caching (Lustre, GPFS scratch): {fix}",
        )
    return passed(found)


@nodes("packages", needs=[JOB])
def packages(there: Nodes) -> Finding:
    """Compare packages with those of the login node, and between the ranks."""
    python = there.set("container" if there.facility.container else "python")
    missing = [p for p in NEEDED if any(p not in r["packages"] for r in there.reports)]
    if missing:
        return failed(
            f"missing: {', '.join(missing)}",
            f"pip install 'flwr-hpc[train]' in the environment of the jobs ({python})",
        )
    if broken := next((r["torch"]["error"] for r in there.reports if "error" in r["torch"]), ""):
        return failed(
            f"torch or transformers cannot be imported: {broken}",
            f"load what they need in {there.set('setup')}, e.g. module load cuda; or fix {python}",
        )
    ours = Counter(r["flwr_hpc"] for r in there.reports)
    if set(ours) != {__version__}:
        return failed(
            f"flwr-hpc {', '.join(sorted(ours))}; {__version__} on the login node",
            f"install the same version there, or name the same environment: {python}=PATH",
        )
    return _compared(there, python)


def _compared(there: Nodes, python: str) -> Finding:
    first = there.reports[0]["packages"]
    unequal = [p for p in first if any(r["packages"].get(p) != first[p] for r in there.reports)]
    if unequal:
        return failed(f"not the same in all ranks: {', '.join(unequal)}", f"{python}=PATH")
    other = [p for p in first if p in there.here and there.here[p] != first[p]]
    found = f"torch {first['torch']}, transformers {first['transformers']}, peft {first['peft']}"
    if other:
        seen = ", ".join(f"{p} {first[p]} ({there.here[p]} on the login node)" for p in other)
        return warned(
            f"{found}; other versions: {seen}", f"one environment for both: {python}=PATH"
        )
    slowest = max(float(r["torch"]["seconds"]) for r in there.reports)
    return passed(f"{found}; imported in {slowest:.0f} s")


@nodes("GPUs", needs=["packages"])
def gpus(there: Nodes) -> Finding:
    """Compare number and memory of the GPUs with what the facility's file declares."""
    f = there.facility
    if f.gpus_per_node == 0:
        return skipped("none declared")
    broken = next((r["gpus"]["error"] for r in there.reports if "error" in r["gpus"]), "")
    if broken or not all(r["torch"]["cuda"] for r in there.reports):
        return failed(
            broken or "torch finds no GPU",
            f"a torch built for this {f.gpu_vendor} driver; with a container also "
            f"{there.set('gpu_vendor')}; and look at {there.set('gpu_request')}",
        )
    for host, reports in there.hosts.items():
        if (count := _count(reports)) != f.gpus_per_node:
            return failed(
                f"{host} has {count} GPUs for this job, {f.gpus_per_node} declared",
                f"{there.set('gpus_per_node')}={count}, or another {there.set('gpu_request')}",
            )
    return _memory(there)


def _count(reports: list[dict[str, Any]]) -> int:
    """Return a node's GPUs; each rank may see all of them or its own."""
    ids = {g["uuid"] for r in reports for g in r["gpus"]}
    return len(ids) if "" not in ids else max(len(r["gpus"]) for r in reports)


def _memory(there: Nodes) -> Finding:
    devices = [g for r in there.reports for g in r["gpus"]]
    names = ", ".join(sorted({g["name"] for g in devices}))
    least = min(int(g["bytes"]) for g in devices) / 2**30
    found = f"{there.facility.gpus_per_node} per node: {names}, {least:.0f} GiB"
    declared = there.facility.gpu_memory_gb
    if declared and not MEMORY_SLACK * declared <= least <= declared / MEMORY_SLACK:
        return warned(
            f"{found}; {declared:g} declared", f"{there.set('gpu_memory_gb')}={least:.0f}"
        )
    return passed(found)


@nodes("cores per rank", needs=[JOB])
def cores(there: Nodes) -> Finding:
    """See whether each rank may use as many cores as declared, and not another's."""
    want = there.facility.cpus_per_rank
    complain = warned if there.facility.local else failed
    least = min(len(r["cores"]) for r in there.reports)
    if least < want:
        return complain(
            f"a rank may use {least}, {want} declared",
            f"{there.set('cpus_per_rank')}={least}, or look at {there.set('launcher_args')} "
            "(--cpu-bind, --hint=nomultithread)",
        )
    for host, reports in there.hosts.items():
        together = len({core for r in reports for core in r["cores"]})
        if together < want * len(reports):
            return complain(
                f"{host}: {len(reports)} ranks share {together} cores, {want} each declared",
                f"'{there.set('launcher_args')}=[--cpu-bind=cores]'",
            )
    return passed(f"{least}" if least == want else f"{least}, {want} declared")


@nodes("rendezvous", needs=["packages"])
def rendezvous(there: Nodes) -> Finding:
    """See whether the ranks met, as the trainer's do, and how fast they are."""
    met = [r.get("meeting", {"error": "no answer"}) for r in there.reports]
    faults = sorted({m["error"] for m in met if "error" in m})
    if faults:
        return failed(
            "; ".join(faults),
            "name the interface that nodes reach each other by, see ip -br address: "
            f"{there.set('env.GLOO_SOCKET_IFNAME')}=IF {there.set('env.NCCL_SOCKET_IFNAME')}=IF",
        )
    found = (
        f"{met[0]['ranks']} ranks ({met[0]['device']}) in {max(m['seconds'] for m in met):.1f} s"
    )
    if "gigabytes_s" in met[0]:
        found += f", all-reduce at {min(m['gigabytes_s'] for m in met):.1f} GB/s"
    return passed(found)


@nodes(BANDWIDTHS, needs=["rendezvous"])
def bandwidths(there: Nodes) -> Finding:
    """See what collectives reached, where that was to be measured."""
    found = [r["bandwidth"] for r in there.reports if "bandwidth" in r]
    if not found:
        return skipped("measured with --bandwidth, for flwr_hpc.plan")
    faults = sorted({b["error"] for b in found if "error" in b})
    if faults:
        return failed(
            "; ".join(faults),
            "the ranks meet and large messages stall: look at the interfaces and libraries of "
            f"{there.set('env')} (NCCL_DEBUG=INFO says which are used), or fewer nodes: --nodes 1",
        )
    rows = there.bandwidths.rows if there.bandwidths else []
    if not rows:
        return failed("not one group was measured in time", "fewer nodes: --nodes 1")
    speeds = [row.gb_s for row in rows]
    text = f"{len(rows)} kinds of groups: {min(speeds):.3g} to {max(speeds):.3g} GB/s"
    if len(rows) < found[0]["kinds"]:
        return warned(
            f"{text}; {found[0]['kinds'] - len(rows)} kinds not measured in time",
            "plans assume those; fewer nodes measure fewer kinds: --nodes 2",
        )
    return passed(text)


@nodes("clock", needs=[JOB])
def clock(there: Nodes) -> Finding:
    """Compare the nodes' clocks with the login node's, as closely as files tell."""
    if not there.probed.clock_s:
        return skipped("no file came back in time")
    bounds = [sorted(ends) for ends in there.probed.clock_s.values()]
    surely = max(max(0.0, low, -high) for low, high in bounds)
    closest = min(high - low for low, high in bounds)
    fix = "ask the centre: the clocks of login and compute nodes differ"
    if surely > CLOCK_FAIL_S:
        return failed(f"{surely:.0f} s apart", fix)
    if surely > CLOCK_WARN_S:
        return warned(f"{surely:.0f} s apart", fix)
    return passed(f"no difference found (within {max(closest, surely):.1f} s)")


@nodes("temporary files", needs=[JOB])
def tmp(there: Nodes) -> Finding:
    """Look at the room for temporary files on the nodes."""
    least = min(there.reports, key=lambda r: int(r["tmp_free"]))
    found = f"{least['tmp']}: {least['tmp_free'] / 1e9:.1f} GB free"
    if least["tmp_free"] < LEAST_TMP:
        return warned(found, f"{there.set('env.TMPDIR')}=/path with more room")
    return passed(found)


@nodes("outbound reach", needs=[JOB])
def outbound(there: Nodes) -> Finding:
    """Compare with `internet`, which says whether jobs may count on the outside."""
    if not there.facility.internet:
        return skipped("not counted on (internet: false)")
    faults = {u: why for r in there.reports for u, why in r["unreachable"].items() if why}
    if faults:
        return failed(
            "; ".join(f"{url}: {why}" for url, why in faults.items()),
            f"{there.set('internet')}=false, or the centre's proxy: "
            f"{there.set('env.https_proxy')}=http://HOST:PORT",
        )
    return passed(", ".join(there.reports[0]["unreachable"]) or "nothing to try")
