"""Serves embeddings and similar items over HTTP: Ray Serve in front, Redis behind."""
