"""itemvec: dense embeddings of items from their feature tables, trained by Ray and served to recommenders over HTTP."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("itemvec")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
