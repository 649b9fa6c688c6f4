"""The core's own runners: `reference`, the oracle, and `cpu`, for real use without a GPU."""
