"""What BENCHMARKS.md reports, measured side by side."""
