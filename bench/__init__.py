"""Benchmarks. `eager`: the formulations to beat; `measure`: instruments; `cpu`: the CPU table."""
