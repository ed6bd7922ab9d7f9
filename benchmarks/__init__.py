"""One command for each published figure: `python -m benchmarks.NAME --out DIR`."""
