"""The language model service."""
