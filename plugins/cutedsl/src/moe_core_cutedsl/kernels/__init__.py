"""Kernels of this plugin: what stands between a dispatcher and FlashInfer's GEMMs."""
