"""Benchmarks: what `lrt bench` measures, always against a slower twin or a plainer model in the same run."""
