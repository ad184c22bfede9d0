"""What the embedding and the rerank service share: tokens, micro-batches, replicas and the model adapter.

A service process holds the event loop and the tokenizer, no model. Each replica is a process of its own (Python's
interpreter lock would make two of them one), reached through a socket pair:

    texts -> tokens.py (ids) -> microbatch.py (which rows together) -> dispatch.py -> replicas.py (processes)
    in a process: replica.py -> model.py
"""
