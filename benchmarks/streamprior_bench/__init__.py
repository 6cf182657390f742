"""The benchmarks: one module for each hot path, a JSON line a measurement, ratios within one run."""
