"""What `up` prints once a mesh is there."""

from deploy.launch.mesh import curl


def test_the_line_to_paste_works_on_this_machine() -> None:
    assert curl("llm", "m", "127.0.0.1:8000").startswith("curl http://127.0.0.1:8000/v1/chat/completions -H 'content-")
    assert curl("rerank", "m", "0.0.0.0:80").startswith("curl http://127.0.0.1:80/v1/rerank ")
    assert curl("llm", "m", "https://0.0.0.0:443").startswith("curl https://127.0.0.1:443/v1/chat/")
    shown = curl("embedding", "m", "[::]:80", keys=True)
    assert shown.startswith('curl http://[::1]:80/v1/embeddings -H "authorization: Bearer $KEY" ')
