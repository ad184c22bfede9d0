"""Bytes to messages and back: gRPC, REST, console. One forwarder behind all of them."""
