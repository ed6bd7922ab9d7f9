"""Trains a model version from an item table, on Ray: what happens between a table and the registry."""
