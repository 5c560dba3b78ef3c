"""A comparison on a Ray cluster: each trial is one task on any node with enough resources."""

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
"""Number of times that a trial is retried after losing its worker, before it counts as failed."""

_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """Where trials run, and the resources of each.

    Attributes:
        cpus: number of cores per trial.
        gpus: number of accelerators per trial; None uses one if the cluster has any.
        address: address of a running cluster; None starts one on this machine for the comparison,
            unless ``RAY_ADDRESS`` is set.
    """

    cpus: float = 1.0
    gpus: float | None = None
    address: str | None = None


def import_ray() -> Any:
    """Import Ray, with its usage statistics disabled.

    Raises:
        InputError: Ray is not installed.
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
    """Run all trials without a record as tasks, with the same results as in one process.

    Raises:
        InputError: the cluster does not exist, no node has enough resources for a trial, or a node
            does not share the comparison's folder; or an error raised by a trial.
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
                    time.sleep(_POLL_SECONDS)  # other processes run the remaining trials
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _run_there(
    comparison: Comparison, caches: Caches, trial: Trial, folder: str, directory: str
) -> bool:
    """Run a trial in a worker; return False if another process holds or has finished it."""
    quiet_environment()
    try:
        os.chdir(directory)  # paths may be relative
    except OSError as error:
        raise InputError(
            f"--launcher ray: the node {socket.gethostname()} has no {directory}; all nodes must "
            "share the folder in which kdrun is started"
        ) from error
    with quiet_libraries():
        return try_trial(comparison, Ledger.of(Path(folder)), caches, trial, watch_nothing)


def _collect(ray: Any, comparison: Comparison, ledger: Ledger, ref: Any, trial: Trial) -> bool:
    """Whether a task ran its trial. A trial that keeps losing workers is recorded as failed."""
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
    """Use Ray if it is initialised; otherwise connect, and shut the connection down at the end."""
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
    """Refuse a ``HOST:PORT`` without a server, for which Ray would retry for minutes.

    Raises:
        InputError: naming the address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # Ray handles values such as "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--ray-address {address}: no connection ({error}); start one with ray start --head"
        ) from error


def check_room(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> None:
    """Refuse resources that no node has, for which Ray would wait forever.

    Args:
        nodes: resources of each node, by Ray's names.
        cpus: number of cores per trial.
        gpus: number of accelerators per trial.

    Raises:
        InputError: names the resources of the nodes.
    """
    have = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    if not any(node[0] >= cpus and node[1] >= gpus for node in have):
        shown = ", ".join(f"{node[0]:g} and {node[1]:g}" for node in have)
        raise InputError(
            f"--trial-cpus {cpus:g} --trial-gpus {gpus:g}: no node of the cluster is that large "
            f"(CPUs and GPUs by node: {shown})"
        )
