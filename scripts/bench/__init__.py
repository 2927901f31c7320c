"""The benchmarks of mergefs: what ``scripts/bench.py`` measures and writes into docs/benchmarks.md."""
