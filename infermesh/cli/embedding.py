"""`infermesh embedding`: one embedding service in the foreground."""

from __future__ import annotations

from infermesh.cli import encoding_options as options


def command(
    model: options.Model = None,
    source: options.Source = None,
    alias: options.Alias = None,
    devices: options.Devices = None,
    replicas: options.Replicas = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    max_tokens: options.MaxTokens = None,
    threads: options.Threads = None,
    batch_tokens: options.BatchTokens = None,
    batch_rows: options.BatchRows = None,
    batch_wait_ms: options.BatchWaitMs = None,
    batch_timeout_s: options.BatchTimeoutS = None,
    queue_tokens: options.QueueTokens = None,
    queue_rows: options.QueueRows = None,
    export_dir: options.ExportDir = None,
    listen: options.Listen = None,
    advertise: options.Advertise = None,
    registry: options.Registry = None,
    registry_prefix: options.RegistryPrefix = None,
    registry_token_file: options.RegistryTokenFile = None,
    registry_ca_file: options.RegistryCaFile = None,
    registry_cert_file: options.RegistryCertFile = None,
    registry_key_file: options.RegistryKeyFile = None,
    instance_id: options.InstanceId = None,
    tier: options.Tier = None,
    weight: options.Weight = None,
    zone: options.Zone = None,
    max_running: options.MaxRunning = None,
    device: options.Device = None,
    fixed_ms: options.FixedMs = None,
    tokens_per_s: options.TokensPerS = None,
    keys: options.KeysFile = None,
    operator_key_file: options.OperatorKeyFile = None,
    insecure: options.Insecure = None,
    grace_s: options.GraceS = None,
    ready_file: options.ReadyFile = None,
    log_level: options.LogLevel = None,
) -> int:
    """Run one embedding service: sentence-transformers in worker processes, devices x replicas of them.

    It registers itself, serves gRPC, and leaves on SIGTERM after finishing what is running.

    Examples:
        infermesh embedding --registry consul://10.0.0.5:8500
        infermesh embedding --model bge-m3 --source BAAI/bge-m3 --devices cuda:2,cuda:3 --replicas 2
        infermesh embedding --model gte --source ./gte-small --backend openvino --threads 4
    """
    found = options.given(dict(locals()))
    import asyncio

    from services.embedding.app import run
    from services.embedding.settings import EmbeddingSettings

    return asyncio.run(run(EmbeddingSettings(**found)))
