"""Runs inside .venv-compat with -I: import all of the client wheel, and carry a message over a real socket."""

from __future__ import annotations

import importlib
import pkgutil
from concurrent import futures
from importlib.metadata import distributions

import google.protobuf
import grpc

import infermesh
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc as rpc


class Echo(rpc.LanguageModelServiceServicer):
    """Answers a chat with one delta that carries the model's name."""

    def Chat(self, request: lm.ChatRequest, context: grpc.ServicerContext):
        yield lm.ChatResponse(deltas=[{"content": request.model, "token_ids": [1, 2, 3]}])


def main() -> None:
    """Fail loudly or print one line."""
    installed = sorted(found.metadata["Name"].lower().replace("_", "-") for found in distributions())
    assert set(installed) == {"grpcio", "infermesh-client", "protobuf", "typing-extensions"}, installed
    modules = [found.name for found in pkgutil.walk_packages(infermesh.__path__, "infermesh.")]
    for name in modules:
        importlib.import_module(name)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    rpc.add_LanguageModelServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = lm.ChatRequest(model="modèle")
        assert lm.ChatRequest.FromString(request.SerializeToString()) == request
        (answer,) = rpc.LanguageModelServiceStub(channel).Chat(request, timeout=10)
    server.stop(None)
    assert answer.deltas[0].content == "modèle" and list(answer.deltas[0].token_ids) == [1, 2, 3]
    print(f"ok: {len(modules)} modules, protobuf {google.protobuf.__version__}, grpcio {grpc.__version__}")


if __name__ == "__main__":
    main()
