"""Kernel configurations for any shape: a performance model, bounded tuning, and stores of what was measured.

A plan: `configs = store.bound(binding)` when it is bound, `configs(tokens)` in a forward. Tuning: `tuning.run_job`.
Import from the modules: nothing here imports torch or triton before a device is looked at.
"""
