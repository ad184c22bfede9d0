"""What is on a Ray cluster now, as JSON. A process of its own: `up` holds grpc channels, and one process can be a job
of one cluster only.

    python -P -m deploy.launch.on_ray.look HOST:PORT
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from deploy.launch.on_ray import cluster


def main(argv: list[str]) -> int:
    try:
        ray = cluster.connect(argv[0])
    except cluster.ClusterFault as fault:
        print(fault, file=sys.stderr)
        return 1
    print(json.dumps(asdict(cluster.view(ray))), flush=True)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # Ray's threads are not waited for
