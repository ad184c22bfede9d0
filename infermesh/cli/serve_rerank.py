"""The service half of `infermesh rerank`: one rerank service in the foreground."""

from __future__ import annotations

from typing import Annotated

import typer

from infermesh.cli import encoding_options as options


def command(
    model: options.Model = None,
    source: options.Source = None,
    alias: options.Alias = None,
    scorer: Annotated[str | None, typer.Option(help="auto, cross-encoder or bi-encoder.")] = None,
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
    """Run one rerank service: a cross-encoder, or any embedding model by cosine.

    It registers itself, serves gRPC, and leaves on SIGTERM after finishing what is running.

    Examples:
        infermesh rerank --listen 127.0.0.1:0 --registry mesh://10.0.0.5:50049
        infermesh rerank --model bge-reranker --source BAAI/bge-reranker-v2-m3 --devices cuda:0
    """
    found = options.given(dict(locals()))
    import asyncio

    from services.rerank.app import serve
    from services.rerank.settings import RerankSettings

    return asyncio.run(serve(RerankSettings(**found)))
