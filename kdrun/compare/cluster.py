"""A comparison on a Ray cluster: each trial is a task, on whatever node has room for it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.compare.ledger import Ledger
from kdrun.compare.record import Record, Trial
from kdrun.compare.run import Caches, Comparison, Watch, try_trial, watch_nothing
from kdrun.errors import InputError
from kdrun.quiet import quiet_environment, quiet_libraries

_RETRIES = 3
"""A trial whose worker is lost runs again so many times before it counts as failed."""

_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """Where trials run, and what each takes.

    Attributes:
        cpus: cores of a trial.
        gpus: accelerators of a trial; None takes one where the cluster has any.
        address: of a running cluster; None starts one on this machine for the comparison, unless
            ``RAY_ADDRESS`` names another.
    """

    cpus: float = 1.0
    gpus: float | None = None
    address: str | None = None


def import_ray() -> Any:
    """Ray, without its statistics on usage.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InputError(
            "--launcher ray needs Ray, which is not installed: pip install 'kdlosses[ray]'"
        ) from error
    return ray


def run_on_ray(
    comparison: Comparison, ledger: Ledger, caches: Caches, cluster: Cluster, watch: Watch
) -> list[Record]:
    """Run all trials that have no record as tasks, in the same way as one process would.

    Raises:
        InputError: no such cluster, no node with room for a trial, or a node that does not share
            the comparison's folder; or as a trial raises it.
    """
    ray = import_ray()
    with _connected(ray, cluster.address):
        gpus = cluster.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        check_room(nodes, cluster.cpus, gpus)
        task = ray.remote(num_cpus=cluster.cpus, num_gpus=gpus, max_retries=_RETRIES)(_run_there)
        running: dict[Any, Trial] = {}
        try:
            while True:
                records = comparison.plan.own(ledger.records())
                watch(comparison.plan.planned(records), records, None)
                to_run = comparison.plan.open(records)
                if not to_run:
                    return records
                for trial in to_run:
                    if trial not in running.values():
                        place = (str(ledger.folder), os.getcwd())
                        running[task.remote(comparison, caches, trial, *place)] = trial
                ended, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                held = [_collect(ray, comparison, ledger, ref, running.pop(ref)) for ref in ended]
                if held and not any(held):
                    time.sleep(_POLL_SECONDS)  # other processes hold what is left
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _run_there(
    comparison: Comparison, caches: Caches, trial: Trial, folder: str, directory: str
) -> bool:
    """What a worker does; false where another process held the trial or had ended it."""
    quiet_environment()
    try:
        os.chdir(directory)  # paths of models, rows and folder are as they were given
    except OSError as error:
        raise InputError(
            f"--launcher ray: the node {socket.gethostname()} has no {directory}; all nodes must "
            "share the folder in which kdrun is started"
        ) from error
    with quiet_libraries():
        return try_trial(comparison, Ledger.of(Path(folder)), caches, trial, watch_nothing)


def _collect(ray: Any, comparison: Comparison, ledger: Ledger, ref: Any, trial: Trial) -> bool:
    """The end of a task: whether it ran its trial; a trial that keeps losing workers has failed."""
    lost = (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.NodeDiedError,
    )
    try:
        return bool(ray.get(ref))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except lost as error:
        identity = comparison.plan.identity(trial)
        reason = f"the worker was lost {_RETRIES + 1} times: {str(error).splitlines()[0]}"
        with ledger.claim(identity) as mine:
            if mine:
                ledger.add(Record(id=identity, trial=trial, status="failed", reason=reason))
        return True


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Ray as the calling program has set it up, or connected here and let go of at the end."""
    if ray.is_initialized():
        yield
        return
    if address is not None:
        check_address(address)
    try:
        ray.init(
            address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError) as error:
        where = f"--ray-address {address}" if address else "--launcher ray"
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: {reason}; start one with ray start --head") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse a ``HOST:PORT`` that nothing answers at, where Ray would try for minutes.

    Raises:
        InputError: naming the address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like, which Ray itself understands or refuses
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--ray-address {address}: no connection ({error}); start one with ray start --head"
        ) from error


def check_room(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> None:
    """Refuse what no node can ever run, where Ray would wait.

    Args:
        nodes: what each has, by Ray's names.
        cpus: that a trial takes.
        gpus: likewise.

    Raises:
        InputError: naming what the nodes have.
    """
    have = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    if not any(node[0] >= cpus and node[1] >= gpus for node in have):
        shown = ", ".join(f"{node[0]:g} and {node[1]:g}" for node in have)
        raise InputError(
            f"--trial-cpus {cpus:g} --trial-gpus {gpus:g}: no node of the cluster is that large "
            f"(CPUs and GPUs by node: {shown})"
        )
