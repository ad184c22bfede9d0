"""Generated stubs of the package infermesh.v1. Never edited: `make protos` writes them."""
