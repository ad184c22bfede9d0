"""Instances on a Ray cluster: each is a local child of `up` (child.py) that holds a placement group and, on the node
that it got, an actor around the service's process (service.py). What is decided is in need.py and choose.py, pure.
"""
