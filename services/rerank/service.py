"""RerankService: documents by relevance to a query."""

from __future__ import annotations

import math

from infermesh.errors import MeshError, Reason
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1 import rerank_pb2_grpc
from infermesh.v1.inference_pb2 import Usage
from registry.endpoint import Endpoint
from services.chassis.admittance import admit
from services.chassis.arrivals import Arrivals
from services.chassis.checks import check_rerank
from services.chassis.encoding.engine import EncodingEngine
from services.chassis.encoding.tokens import cut_of
from services.chassis.identity import Identity, announce
from services.chassis.keys import Keys
from services.chassis.rpc import Context, unary
from services.rerank.scorer import Question, Scorer, ranked

SERVICE = "infermesh.v1.RerankService"


class RerankService(rerank_pb2_grpc.RerankServiceServicer):
    """`serve` tells it what is served once the model is in; the chassis lets no call in before."""

    def __init__(
        self, engine: EncodingEngine, scorer: Scorer, identity: Identity, arrivals: Arrivals, keys: Keys
    ) -> None:
        self._engine = engine
        self._scorer = scorer
        self._identity = identity
        self._arrivals = arrivals
        self._keys = keys
        self._names: frozenset[str] = frozenset()

    def serve(self, endpoint: Endpoint) -> None:
        self._names = frozenset((endpoint.model, *endpoint.aliases))

    @unary
    async def Rerank(self, request: rr.RerankRequest, context: Context) -> rr.RerankResponse:
        relay = admit(request, context, self._keys, self._names)
        check_rerank(request)
        cut = cut_of(request.truncation)
        rows = await self._scorer.rows(Question(request.query, request.documents, cut, request.max_tokens_per_document))
        tokens = sum(map(len, rows))
        priority = request.hints.priority
        with self._arrivals.enter(relay, tokens) as entry:
            values = await self._engine.run(rows, bulk=priority < 0, priority=priority, started=entry.started)
        scores = self._scorer.scores(values, raw=request.raw_scores)
        results = [self._result(request, index, float(scores[index])) for index in ranked(scores, request.top_n)]
        await announce(context, self._identity)
        return rr.RerankResponse(results=results, usage=Usage(prompt_tokens=tokens), model=self._identity.model)

    def _result(self, request: rr.RerankRequest, index: int, score: float) -> rr.Ranked:
        if not math.isfinite(score):
            raise MeshError(Reason.ENGINE_FAILED, f"the model's score of documents[{index}] is not a number")
        return rr.Ranked(
            index=index, score=score, document=request.documents[index] if request.return_documents else ""
        )
