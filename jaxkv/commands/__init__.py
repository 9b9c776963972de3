"""The commands around the engine and the server, one module each: ``chat``, ``bench``, ``inspect``.

``http`` how they talk to a server; ``load`` the requests of a benchmark and their measurements; ``model_facts`` what a
directory holds. What is heavy (JAX) is imported after the arguments are known to be good, and only where a model is loaded.
"""
