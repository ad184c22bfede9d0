"""An assistant that answers from a folder of documents: bulk embedding, a vector store, `Retrieve.Answer`.

.venv/bin/python -m examples.rag index                         # this repository's own documents
.venv/bin/python -m examples.rag ask "What happens when Consul is gone?"
.venv/bin/python -m examples.rag chat                          # follow-up questions find their passages in the cache
"""
