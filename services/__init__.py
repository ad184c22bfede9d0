"""The processes of a mesh: gateway and model services, each a folder of its own."""
