"""The messages of the Container Storage Interface and of the kubelet's plugin registration.

Modules ``*_pb2`` and ``*_pb2_grpc`` are made of the ``.proto`` files when envstore is built or
installed (``hatch_build.py``); they are not in the repository.
"""
