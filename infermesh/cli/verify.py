"""`infermesh verify`."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, FAILED, Failure, connect
from infermesh.cli.printing import emit_json, remark

if TYPE_CHECKING:
    from infermesh.transport import Trust
    from services.llm.agreement import Agreement, Difference, Position

ALTERNATIVES = 5
MOST_TURNS = 12  # of one prompt, after a difference; more of them say no more
SHOWN = 5


def command(
    instance_id: Annotated[str, typer.Argument(help="Whom; with --record: nobody.")] = "",
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what transformers answers with --source's weights.")
    ] = None,
    against: Annotated[Path | None, typer.Option(metavar="FILE", help="Compare the instance with such a file.")] = None,
    source: Annotated[str, typer.Option(help="--record: the weights, a folder or a hub name.")] = "",
    dtype: Annotated[str, typer.Option(help="--record: auto, float32, float16 or bfloat16.")] = "auto",
    tokens: Annotated[int, typer.Option(help="--record: of each answer.", min=1, max=4096)] = 48,
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    instances_ca_file: connect.InstancesCaFile = None,
    instances_tls_name: connect.InstancesTlsName = "",
    timeout: connect.Timeout = 600,
    json: connect.Json = False,
) -> int:
    """Check that an instance answers as transformers does with the same weights: top tokens and log-probabilities.

    --record runs where the reference fits (it needs torch and transformers), --against anywhere. Close races between
    two tokens that rounding turns around are no fault; how close depends on what the instance computes in.

    Examples:
        infermesh verify --record qwen.json --source Qwen/Qwen2.5-7B-Instruct
        infermesh verify llm-1 --against qwen.json
    """
    if (record is None) == (against is None):
        raise Failure(
            "--record FILE makes a reference from the same weights in transformers, where they fit; "
            "--against FILE compares the instance with it: one of the two is needed",
            BAD_USAGE,
        )
    if record is not None:
        _record(record, source, dtype, tokens)
        return 0
    assert against is not None
    if not instance_id:
        raise Failure("say which instance: infermesh verify ID --against FILE", BAD_USAGE)
    tls = connect.trusted(instances_ca_file, instances_tls_name)
    document = _compare(instance_id, _reference(against), gateway, api_key_file, tls, timeout)
    if json:
        emit_json(document)
    else:
        _show(document)
    return FAILED if document["faults"] else 0


def _record(path: Path, source: str, dtype: str, tokens: int) -> None:
    from services.llm.reference import record

    if not source:
        raise Failure("--record needs --source, a folder or a hub name", BAD_USAGE)
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise Failure(f"--dtype {dtype!r} is not one of auto, float32, float16, bfloat16", BAD_USAGE)
    found = record(source, dtype, tokens, remark)
    try:
        path.write_text(jsonlib.dumps(found, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise Failure(f"--record {path}: {error.strerror}") from None
    remark(f"written: {path}: {len(found['prompts'])} answers of {tokens} tokens, {found['dtype']}, {found['made_by']}")


def _reference(path: Path) -> dict[str, Any]:
    from services.llm.agreement import VERSION

    try:
        found: dict[str, Any] = jsonlib.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION or not found["prompts"]:
            raise ValueError("another version")
    except OSError as error:
        raise Failure(f"--against {path}: {error.strerror}", BAD_USAGE) from None
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"--against {path}: not what --record writes ({error})", BAD_USAGE) from None
    return found


def _compare(
    id: str, reference: dict[str, Any], gateway: str, key_file: Path | None, tls: Trust | None, timeout: float
) -> dict[str, Any]:
    import grpc

    from infermesh.client.addresses import as_error
    from infermesh.transport import channel_options, open_channel
    from infermesh.v1.language_model_pb2_grpc import LanguageModelServiceStub
    from services.llm.agreement import Agreement, tolerance_of

    with connect.client(gateway, key_file, 10) as mesh:
        whom = connect.instance(mesh, id)
    name, tolerance = tolerance_of(whom.metadata.get("dtype", ""), whom.metadata.get("quantization", ""))
    agreement, faults = Agreement(), []
    with open_channel(whom.address, channel_options(), tls) as line:
        shown = connect.operator_pass(connect.api_key(key_file), whom.address, timeout * len(reference["prompts"]))
        asked = _Asked(LanguageModelServiceStub(line), whom.model, shown, timeout)
        try:
            faults += asked.tokenizer_faults(reference)
            for number, prompt in enumerate(reference["prompts"]):
                remark(f"prompt {number + 1} of {len(reference['prompts'])}")
                asked.compare(number, prompt, agreement)
        except grpc.RpcError as error:
            raise as_error(error, [whom.address]) from None
    faults += agreement.faults(tolerance)
    drifts = agreement.drifts
    return {
        "id": whom.id,
        "model": whom.model,
        "reference": {key: reference[key] for key in ("source", "dtype", "made_by")},
        "judged_as": name,
        "positions": agreement.positions,
        "top1_agreement": 1 - len(agreement.differences) / max(1, agreement.positions),
        "unexplained": len(agreement.unexplained(tolerance)),
        "logprob_drift": sum(drifts) / len(drifts) if drifts else None,
        "differences": [_told(one, reference) for one in agreement.differences[:SHOWN]],
        "faults": faults,
    }


class _Asked:
    """One instance, asked directly."""

    def __init__(self, stub: Any, model: str, metadata: Any, timeout: float) -> None:
        self._stub, self._model, self._metadata, self._timeout = stub, model, metadata, timeout

    def tokenizer_faults(self, reference: dict[str, Any]) -> list[str]:
        """Texts and the conversation that become other tokens than in the reference."""
        from infermesh.client.requests import tokenize_request

        found = []
        for prompt in reference["prompts"]:
            if self._ids(tokenize_request(prompt["text"], model=self._model)) != prompt["ids"]:
                found.append(f"the tokenizer differs: {prompt['text'][:40]!r} becomes other tokens")
                break
        chat = reference.get("chat")
        if chat and self._ids(tokenize_request(chat["messages"], model=self._model)) != chat["ids"]:
            found.append("the chat template differs: a conversation becomes other tokens")
        return found

    def _ids(self, request: Any) -> list[int]:
        return list(self._stub.Tokenize(request, metadata=self._metadata, timeout=self._timeout).token_ids)

    def compare(self, number: int, prompt: dict[str, Any], agreement: Agreement) -> None:
        """The greedy answer, taken up again behind the reference's token wherever it differs."""
        expected = [_position(one) for one in prompt["answer"]]
        at = 0
        for _ in range(MOST_TURNS):
            if at >= len(expected):
                return
            ids = [*prompt["ids"], *(one.token for one in expected[:at])]
            got = self._greedy(ids, len(expected) - at)
            if not got:
                raise Failure(f"{self._model}: no log-probabilities with token ids came back; nothing can be compared")
            at = agreement.add(number, at, expected, got)

    def _greedy(self, ids: list[int], tokens: int) -> list[Position]:
        from infermesh.v1 import language_model_pb2 as lm
        from services.llm.agreement import Position

        request = lm.CompleteRequest(model=self._model)
        request.token_ids.ids.extend(ids)
        request.sampling.MergeFrom(
            lm.Sampling(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=ALTERNATIVES)
        )
        request.delivery.token_ids = True
        events = self._stub.Complete(request, metadata=self._metadata, timeout=self._timeout)
        lines = [line for event in events for delta in event.deltas for line in delta.logprobs]
        return [
            Position(line.token_id, line.logprob, {one.token_id: one.logprob for one in line.top}) for line in lines
        ]


def _position(one: dict[str, Any]) -> Position:
    from services.llm.agreement import Position

    return Position(one["token"], one["logprob"], {int(token): value for token, value in one["top"].items()})


def _told(one: Difference, reference: dict[str, Any]) -> dict[str, Any]:
    text = reference["prompts"][one.prompt]["text"]
    return {"prompt": text, "at": one.at, "expected": one.expected, "got": one.got, "gap": one.gap}


def _show(document: dict[str, Any]) -> None:
    drift = document["logprob_drift"]
    print(f"{document['id']} against {document['reference']['made_by']} ({document['reference']['dtype']}):")
    print(f"  {document['positions']} tokens, top-1 agreement {document['top1_agreement']:.2%}", end="")
    print(f", {document['unexplained']} differences beyond rounding ({document['judged_as']})")
    print(f"  log-probabilities differ by {drift:.4f} nats in the mean" if drift is not None else "  none agrees")
    for one in document["differences"]:
        gap = "is not among the reference's likeliest" if one["gap"] is None else f"is {one['gap']:.3f} nats behind"
        print(f"  {one['prompt'][:40]!r}: token {one['at']} is {one['got']}, not {one['expected']}; it {gap}")
    for fault in document["faults"]:
        print(f"  {fault}")
    print("not the same" if document["faults"] else "the same")
