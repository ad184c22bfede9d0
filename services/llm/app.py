"""The LLM instance's composition root: settings -> engine -> servicer -> chassis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import grpc.aio

from infermesh.v1 import language_model_pb2_grpc
from registry.endpoint import Capacity, Endpoint, Hardware, Speed
from services.chassis.held_prefixes import HeldPrefixes
from services.chassis.instance import InstanceContext, Program, run_instance
from services.llm.engine import Computed, Engine, EngineInfo
from services.llm.service import SERVICE, LanguageModelService
from services.llm.settings import LlmSettings

Part = TypeVar("Part", Hardware, Speed, Capacity)


async def run(settings: LlmSettings) -> int:
    """Runs the instance to its end and returns the process's exit code."""

    def build(context: InstanceContext) -> Program:
        return program(settings, context)

    return await run_instance(settings, build)


def program(settings: LlmSettings, context: InstanceContext) -> Program:
    held = HeldPrefixes()
    return program_of(build_engine(settings, held, context.arrivals.room.computed), held, settings, context)


def program_of(engine: Engine, held: HeldPrefixes, settings: LlmSettings, context: InstanceContext) -> Program:
    """The service around an engine, which tells `held` of its cache."""
    service = LanguageModelService(engine, context.identity, context.arrivals, context.keys, settings.max_waiting)

    def add_services(server: grpc.aio.Server) -> None:
        language_model_pb2_grpc.add_LanguageModelServiceServicer_to_server(service, server)

    async def start(draft: Endpoint, progress: Callable[[str], None]) -> Endpoint:
        endpoint = complete(draft, await engine.start(progress))
        service.serve(endpoint)
        return endpoint

    def preempts() -> bool:
        return settings.preempt and held.live  # what the engine has computed of a prompt is found again

    return Program((SERVICE,), add_services, start, engine.load, engine.died, engine.close, held, preempts)


def build_engine(settings: LlmSettings, held: HeldPrefixes, computed: Computed) -> Engine:
    """The chosen engine; its libraries are imported here and not before. What it sees of its cache goes to `held`,
    what its steps compute to `computed`."""
    if settings.engine == "vllm":
        from services.llm.engines.vllm import VllmEngine

        return VllmEngine(settings, held, computed)
    if settings.engine == "openai-http":
        from services.llm.engines.openai_http import OpenAiHttpEngine

        return OpenAiHttpEngine(settings)
    from services.llm.engines.scripted import ScriptedEngine

    return ScriptedEngine(settings, held, computed)


def complete(draft: Endpoint, info: EngineInfo) -> Endpoint:
    """The endpoint with what the engine knows; what the operator declared wins."""
    context_max = min(filter(None, (info.capacity.context_max, draft.capacity.context_max)), default=0)
    return dataclasses.replace(
        draft,
        engine=info.engine,
        engine_version=info.engine_version,
        dtype=info.dtype,
        quantization=info.quantization,
        hardware=_over(info.hardware, draft.hardware, Hardware()),
        speed=_over(info.speed, draft.speed, Speed()),
        capacity=dataclasses.replace(_over(info.capacity, draft.capacity, Capacity()), context_max=context_max),
        weights_version=info.weights_version,
        tokenizer_digest=info.tokenizer_digest,
        template_digest=info.template_digest,
        features=info.features,
    )


def _over(known: Part, declared: Part, unset: Part) -> Part:
    """`known` with every field that was declared."""
    given = {
        field.name: getattr(declared, field.name)
        for field in dataclasses.fields(declared)
        if getattr(declared, field.name) != getattr(unset, field.name)
    }
    return dataclasses.replace(known, **given)
