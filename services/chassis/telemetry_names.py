"""Every name that our spans carry, in one place.

`gen_ai.*`, `rpc.*`, `hw.*`, `service.*` and `error.type` are those of OpenTelemetry's semantic conventions, whose GenAI
part is still in development; what they have no name for begins with `infermesh.`.
"""

from __future__ import annotations

SEMCONV = "https://opentelemetry.io/schemas/1.44.0"  # GenAI: open-telemetry/semantic-conventions-genai, November 2026

# Spans and their events.
ROUTE = "route"
ATTEMPT = "attempt"
RESUME = "resume"
DEGRADE = "degrade"
DECISION = "decision"

# What was asked for, and what came of it.
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
FIRST_CHUNK_S = "gen_ai.response.time_to_first_chunk"
ERROR_TYPE = "error.type"  # the word of a Reason, as in docs/errors.md
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.response.status_code"
HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
HTTP_STATUS = "http.response.status_code"
OPERATIONS = {  # by the contract's method; the convention has no word for the last three
    "Chat": "chat",
    "Complete": "text_completion",
    "Embed": "embeddings",
    "EmbedStream": "embeddings",
    "Rerank": "rerank",
    "Tokenize": "tokenize",
    "Detokenize": "detokenize",
}

# Who answered. `VERIFIED`: whether the instance itself said so, in its answer or, before that, in its Link's hello.
INSTANCE_ID = "infermesh.instance.id"
MODEL_ID = "infermesh.model.id"
INCARNATION = "infermesh.instance.incarnation"
VERIFIED = "infermesh.identity.verified"
VERIFIED_BY = "infermesh.identity.verified_by"  # answer | link
REQUEST_ID = "infermesh.request.id"
ATTEMPT_NUMBER = "infermesh.attempt"
ATTEMPTS = "infermesh.attempts"

# A decision of the router. `RECORD` is JSON: the candidates with their terms, and who was rejected, and why.
ROUTE_PREFIX = "infermesh.route."
RECORD = ROUTE_PREFIX + "record"
REASON = ROUTE_PREFIX + "reason"
CHOSEN = ROUTE_PREFIX + "chosen"
WAITED = ROUTE_PREFIX + "waited_s"
PREDICTED_TTFT = ROUTE_PREFIX + "predicted_ttft_s"
PREEMPTED = "infermesh.preempted"
PREDICTED_CACHED = ROUTE_PREFIX + "predicted_cached_tokens"
DEGRADED_FROM = ROUTE_PREFIX + "degraded_from"

RESUME_REASON = "infermesh.resume.reason"
RESUME_TOKENS = "infermesh.resume.tokens"
RESUME_PAUSE = "infermesh.resume.pause_s"
RESUME_EXACT = "infermesh.resume.exact"

# The process: attributes of the resource.
SERVICE_NAMESPACE = "service.namespace"
SERVICE_NAME = "service.name"
SERVICE_INSTANCE = "service.instance.id"
SERVICE_VERSION = "service.version"
HOST_NAME = "host.name"
HW_TYPE = "hw.type"
HW_MODEL = "hw.model"
HW_COUNT = "infermesh.hardware.count"
HW_MEMORY = "infermesh.hardware.memory_mib"  # of one card
ENGINE = "infermesh.engine"
ENGINE_VERSION = "infermesh.engine.version"
