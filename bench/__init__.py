"""Benchmarks of the engine and the server. `bench/README.md` says how to run them; results go to `bench/results/`."""
