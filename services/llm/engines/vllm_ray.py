"""vLLM over several hosts: its Ray executor, on the placement group that `up --ray` has reserved for the instance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUP = "INFERMESH_RAY_GROUP"
NAMESPACE = "infermesh"


def reserved_group(environ: Mapping[str, str]) -> Any:
    """The group that the environment names, in the cluster at RAY_ADDRESS; None where there is none.

    Without it vLLM would make a group of its own: of any cards, beside those that are held for it.
    """
    name = environ.get(GROUP, "")
    if not name:
        return None
    import ray

    if not ray.is_initialized():
        ray.init(address=environ["RAY_ADDRESS"], namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    return ray.util.get_placement_group(name)
