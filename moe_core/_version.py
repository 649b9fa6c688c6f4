"""The only version string of the repository: all seven distributions read it."""

__version__ = "0.1.0"
