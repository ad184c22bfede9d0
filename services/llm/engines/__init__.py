"""Engines behind the port in `services/llm/engine.py`."""
