"""Programs that use a mesh, to read and to take from."""
