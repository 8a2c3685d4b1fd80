"""Loses a machine of a cluster of three, and then works on what is left: `python node_driver.py FOLDER gently|abruptly`.

The machines are raylets on this one. Two of them have a GPU by name; what they compute needs none.
"""

import logging
import sys
import time

import ray
from ray.cluster_utils import Cluster

from workers import dispatch, runtime
from workers.execution import ExecutionSettings
from workers.runtime import RayCluster, encoding_cluster

NUM_UNITS = 14
STORE_BYTES = 80 * 2**20


def prepare(number: int) -> tuple[int, bytes]:
    return number, bytes(10**6)  # too large to come along with the call: it lies on the machine that made it


class Finishers:
    """Makes finishers that take a while, so that a machine goes with units under way."""

    def __call__(self):
        def finish(prepared: tuple[int, bytes]) -> int:
            time.sleep(0.5)
            return prepared[0]

        return finish


def work(cluster: Cluster, settings: ExecutionSettings) -> None:
    """Print what became of it."""
    machine = {"object_store_memory": STORE_BYTES, "num_cpus": 1, "num_gpus": 1}
    machines = [cluster.add_node(**machine) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    found = []
    for result in RayCluster(settings).pipeline(prepare, Finishers(), range(NUM_UNITS), finishers=2, in_flight=6):
        found.append(result)
        if len(found) == 4:
            cluster.remove_node(machines[1], allow_graceful=sys.argv[2] == "gently")
    print("found", *sorted(found), flush=True)
    while ray.cluster_resources()["GPU"] > 1:
        time.sleep(0.1)
    with encoding_cluster(settings, None) as place:
        print("encoders", place.execution.device, place.execution.encoder_actors, flush=True)
        again = place.cluster.pipeline(prepare, Finishers(), range(4), finishers=2, in_flight=4)
        print("found", *sorted(again), flush=True)


def main() -> None:
    logging.basicConfig(format="warned: %(message)s")
    dispatch._PAUSE_S = runtime._WATCH_INTERVAL_S = 2.0
    # The head has no CPU, so that what is prepared lies on the machine that goes, too.
    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES, "temp_dir": sys.argv[1]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        work(cluster, ExecutionSettings(encoder_actors=2, stall_after_s=60))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
