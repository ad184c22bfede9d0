"""vLLM's exceptions -> our reasons."""

from __future__ import annotations

import traceback

import structlog
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from infermesh.errors import MeshError, Reason, invalid, unsupported
from infermesh.v1 import language_model_pb2 as lm
from services.llm.engines.vllm_render import COUNTED_CONTEXTS

Request = lm.ChatRequest | lm.CompleteRequest | lm.TokenizeRequest

RETRY_AFTER_S = 0.5
log = structlog.get_logger("vllm")
_SAMPLING = frozenset(lm.Sampling.DESCRIPTOR.fields_by_name)


def translate(error: Exception, request: Request, context: int, *, started: bool = False) -> MeshError:
    """What vLLM refuses at the start is the caller's fault (its message says what); everything else is ours."""
    if isinstance(error, MeshError):
        return error
    if isinstance(error, GracefulHTTPError):
        return MeshError(Reason.INSTANCE_FULL, "the engine's queue is full", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, ChatTemplateResolutionError):
        return unsupported(
            "messages", "this model has no chat template: use completion, or start it with a chat_template"
        )
    if isinstance(error, EngineDeadError):
        return MeshError(Reason.ENGINE_FAILED, "the engine is dead")
    cause = error.__cause__ if isinstance(error, EngineGenerateError) else error
    if not started and isinstance(cause, VLLMClientError | ValueError | TypeError):
        return _refused(cause, request, context)
    where = traceback.extract_tb((cause or error).__traceback__)[-1:]
    # Neither the message nor the locals: they may hold a prompt.
    log.error(
        "a request failed", error=type(cause or error).__name__, at=[f"{at.filename}:{at.lineno}" for at in where]
    )
    return MeshError(Reason.ENGINE_FAILED, f"the engine failed at this request ({type(cause or error).__name__})")


def _refused(error: Exception, request: Request, context: int) -> MeshError:
    parameter = getattr(error, "parameter", None)
    message = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    if parameter in ("input_tokens", "input_text"):
        return MeshError(
            Reason.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has more than {COUNTED_CONTEXTS * context} tokens, "
            f"this model takes {context} tokens of prompt and answer together",
            param=_input(request),
        )
    if parameter in _SAMPLING:
        return invalid(f"sampling.{parameter}", message)
    if parameter:
        return invalid(parameter, message)
    if not isinstance(request, lm.TokenizeRequest) and (which := request.constraint.WhichOneof("constraint")):
        return invalid(f"constraint.{which}", message)
    return invalid(_input(request), message)


def _input(request: Request) -> str:
    return "messages" if isinstance(request, lm.ChatRequest) else "prompt"
