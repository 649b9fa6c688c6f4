"""The core's own dispatchers."""
