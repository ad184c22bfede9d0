from infermesh.v1 import language_model_pb2 as lm
from services.gateway.upstream.calls import Caller, Method
from services.gateway.upstream.describe import describe


def features(**fields) -> frozenset[str]:
    request = lm.ChatRequest(model="m", messages=[lm.Message(role=lm.ROLE_USER, content="hi")], **fields)
    return describe(Method.CHAT, request, Caller(), 100.0, 1.0).features


def test_tools_that_must_not_be_called_need_no_parser():
    tools = [lm.Tool(name="f")]
    assert "tools" in features(tools=tools)
    assert "tools" not in features(tools=tools, tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_NONE))
