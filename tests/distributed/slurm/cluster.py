"""A real SLURM of two nodes on this machine: slurmctld, two slurmd and munge, with state in one folder.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. The daemons run in a mount namespace whose
/etc/hosts knows the nodes by name, as on a cluster; nothing of the machine's own configuration is read or changed.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
NODES = ("node1", "node2")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Credentials of 5 s, the shortest that are allowed: a requeued job starts again once those of its last attempt expire.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# No cgroups and no accounting: processes are found by their parents.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1_port} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2_port} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=node1,node2 MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    os.environ["PATH"] = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} not found)"
    return None if os.geteuid() == 0 else "SLURM's daemons of this test run as root"


class Cluster:
    """The running cluster.

    Args:
        folder: for everything that it writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        for name in ("state", "munge", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        ports = free_ports(3)
        host = socket.gethostname().split(".")[0]
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                folder=self.folder, host=host, controller_port=ports[0], node1_port=ports[1], node2_port=ports[2]
            )
        )
        hosts = self.folder / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {node}\n" for node in NODES))
        munge = {name: f"--{name.replace('_', '-')}={self.folder}/munge/{name}" for name in ("pid_file", "log_file")}
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--seed-file={self.folder}/munge/seed",
            f"--socket={self.folder}/munge.sock",
            *munge.values(),
        )
        self.until(lambda: (self.folder / "munge.sock").exists(), 10, "munged did not start")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            own_hosts = f"mount --bind {hosts} /etc/hosts && exec slurmd -D -N {node}"
            self._daemon("unshare", "--mount", "sh", "-c", own_hosts)
        self.until(lambda: self.command("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30, "nodes are down")

    def stop(self) -> None:
        """End all jobs and daemons."""
        subprocess.run(["scancel", "--user=root"], env=self._environment, check=False, capture_output=True)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def command(self, *words: str, cwd: Path | None = None) -> str:
        """What a SLURM command prints; empty where it fails (the controller may not be up yet)."""
        done = subprocess.run(words, env=self._environment, cwd=cwd, capture_output=True, text=True, check=False)
        return done.stdout

    def submit(self, *words: str, cwd: Path) -> int:
        """``sbatch WORDS`` in a folder; the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words], env=self._environment, cwd=cwd, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "-o", str(number))))

    def wait(self, number: int, *, timeout: float) -> dict[str, str]:
        """Wait for a job's end, whatever it is, and return what SLURM says of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
        self.until(lambda: self.job(number).get("JobState") in ended, timeout, f"job {number} goes on")
        return self.job(number)

    @staticmethod
    def until(condition: Callable[[], object], timeout: float, complaint: str) -> None:
        """Wait for a condition.

        Raises:
            TimeoutError: with the complaint.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{complaint} after {timeout:g} s")
            time.sleep(0.2)

    def _daemon(self, *words: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(subprocess.Popen(words, env=self._environment, stdout=log, stderr=log))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
