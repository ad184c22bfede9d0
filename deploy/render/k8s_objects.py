"""The Kubernetes objects that a fleet is made of. Pure: plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.render.container import HTTP, SECRETS, SERVICE, START_S, STOP_MARGIN_S, UID, Container

SECRET = "infermesh-keys"
CONSUL = "infermesh-consul"
PART_OF = {"app.kubernetes.io/part-of": "infermesh"}
UNREADY_S = 5  # from SIGTERM on its way until no Service sends requests any more
CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
Object = dict[str, Any]


def labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name, **PART_OF}


def named(kind: str, api: str, name: str, spec: Object, **meta: Any) -> Object:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": labels(name), **meta}, "spec": spec}


def pod(
    name: str,
    made: Container,
    *,
    grace_s: float,
    probes: Object,
    ports: Mapping[str, int],
    volumes: Sequence[Object],
    mounts: Sequence[Object],
    secrets: Sequence[str],
    resources: Object,
    selector: Mapping[str, str],
    more_labels: Mapping[str, str],
    drain: bool = False,
) -> Object:
    """A pod template. `secrets`: names of the keys of our Secret."""
    volumes, mounts = [*volumes, {"name": "tmp", "emptyDir": {}}], [*mounts, {"name": "tmp", "mountPath": "/tmp"}]
    if secrets:
        items = [{"key": secret, "path": secret} for secret in secrets]
        volumes.append({"name": "keys", "secret": {"secretName": SECRET, "defaultMode": 0o440, "items": items}})
        mounts.append({"name": "keys", "mountPath": SECRETS, "readOnly": True})
    container: Object = {
        "name": made.kind,
        "image": made.image,
        "args": list(made.arguments),
        "env": [*_from_the_pod(), *({"name": key, "value": value} for key, value in made.environment.items())],
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": resources,
        "securityContext": CONFINED,
        "volumeMounts": mounts,
        **probes,
    }
    if drain:
        container["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(UNREADY_S)]}}}
    spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # they would set INFERMESH_… variables, which are our options
        "terminationGracePeriodSeconds": int(grace_s + STOP_MARGIN_S + UNREADY_S * drain),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if selector:
        spec["nodeSelector"] = dict(selector)
    return {"metadata": {"labels": {**more_labels, **labels(name)}}, "spec": spec}


def _from_the_pod() -> list[Object]:
    fields = {"POD_NAME": "metadata.name", "POD_IP": "status.podIP"}
    return [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]


def grpc_probes(health: Sequence[str] = ()) -> Object:
    """The kubelet speaks gRPC health, but not over TLS: there the container asks itself by `health`, a command that
    takes a moment of a core. A draining instance is unready, not dead: liveness asks for the port only."""
    ask: Object = {"grpc": {"port": SERVICE}, "timeoutSeconds": 5}
    every = 5
    if health:
        ask, every = {"exec": {"command": list(health)}, "timeoutSeconds": 10}, 15
    return {
        "startupProbe": {**ask, "periodSeconds": 10, "failureThreshold": START_S // 10},
        "readinessProbe": {**ask, "periodSeconds": every},
        "livenessProbe": {
            "tcpSocket": {"port": SERVICE},
            "periodSeconds": 15,
            "timeoutSeconds": 5,
            "failureThreshold": 4,
        },
    }


def http_probes(*, over_tls: bool = False) -> Object:
    def ask(path: str) -> Object:
        scheme = {"scheme": "HTTPS"} if over_tls else {}
        return {"httpGet": {"path": path, "port": HTTP, **scheme}, "timeoutSeconds": 5}

    return {
        "startupProbe": {**ask("/livez"), "periodSeconds": 2, "failureThreshold": 60},
        "readinessProbe": {**ask("/readyz"), "periodSeconds": 5},
        "livenessProbe": {**ask("/livez"), "periodSeconds": 15, "failureThreshold": 4},
    }


def service(name: str, ports: Mapping[str, int], *, headless: bool = False) -> Object:
    spec: Object = {
        "selector": labels(name),
        "ports": [{"name": port, "port": number, "targetPort": number} for port, number in ports.items()],
    }
    if headless:
        spec["clusterIP"] = "None"
    return named("Service", "v1", name, spec)


def disruption_budget(name: str) -> Object:
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": labels(name)}}
    return named("PodDisruptionBudget", "policy/v1", name, spec)


def claim(size_gib: float, storage_class: str, access_mode: str) -> Object:
    spec: Object = {"accessModes": [access_mode], "resources": {"requests": {"storage": f"{round(size_gib)}Gi"}}}
    return {**spec, "storageClassName": storage_class} if storage_class else spec


# Fast to grow, slow to shrink, both decided by the gateways already. The window bridges a gateway that has just started
# and takes what it finds for wanted, while instances that were ordered before still load.
BEHAVIOUR = {"scaleUp": {"stabilizationWindowSeconds": 0}, "scaleDown": {"stabilizationWindowSeconds": 300}}


def horizontal(kind: str, name: str, least: int, most: int, metric: str) -> Object:
    """As many replicas as an external metric says, which an adapter (prometheus-adapter) serves to Kubernetes: the
    metric over an average of 1."""
    told = {"name": metric, "selector": {"matchLabels": {"group": name}}}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": kind, "name": name},
        "minReplicas": least,
        "maxReplicas": most,
        "metrics": [
            {"type": "External", "external": {"metric": told, "target": {"type": "AverageValue", "averageValue": "1"}}}
        ],
        "behavior": BEHAVIOUR,
    }
    return named("HorizontalPodAutoscaler", "autoscaling/v2", name, spec)


def scaled_object(kind: str, name: str, least: int, most: int, metric: str, prometheus: str) -> Object:
    """The same by KEDA, which asks Prometheus itself. No answer means no change: read as 0 it would end everything."""
    query = f'max({metric}{{group="{name}"}})'
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": kind, "name": name},
        "pollingInterval": 15,
        "minReplicaCount": least,
        "maxReplicaCount": most,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": BEHAVIOUR}},
        "triggers": [
            {
                "type": "prometheus",
                "metricType": "AverageValue",
                "metadata": {
                    "serverAddress": prometheus,
                    "query": query,
                    "threshold": "1",
                    "ignoreNullValues": "false",
                },
            }
        ],
    }
    return named("ScaledObject", "keda.sh/v1alpha1", name, spec)


def consul(image: str) -> list[Object]:
    """One server that keeps nothing: instances and gateways register again by themselves when it comes back."""
    user = 100  # of the image
    container = {
        "name": "consul",
        "image": image,
        "command": ["consul"],
        "args": ["agent", "-server", "-bootstrap-expect=1", "-client=0.0.0.0", "-data-dir=/consul/data"],
        "ports": [{"name": "http", "containerPort": 8500}],
        "readinessProbe": {"httpGet": {"path": "/v1/status/leader", "port": 8500}, "periodSeconds": 5},
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "securityContext": CONFINED,
        "volumeMounts": [{"name": "data", "mountPath": "/consul/data"}, {"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "fsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "data", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
    }
    workload = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": labels(CONSUL)},
        "template": {"metadata": {"labels": labels(CONSUL)}, "spec": spec},
    }
    return [service(CONSUL, {"http": 8500}), named("Deployment", "apps/v1", CONSUL, workload)]
