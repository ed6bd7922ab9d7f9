"""The same encoder behind other servers, each as its own documentation would have it written in an afternoon.

Each is a program, `python -m benchmarks.peers.NAME PORT VERSION`, where VERSION is the folder of a model version. All
check the request with pydantic and encode in one process and one thread of torch, with `ModelVersion.encode` or, where
the variable ENCODER says `plain`, as one writes that in an afternoon.
"""
