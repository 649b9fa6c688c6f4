"""Bridges to other projects. Each imports its project only when it is itself imported."""
