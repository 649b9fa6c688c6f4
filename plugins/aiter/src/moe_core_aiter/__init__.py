"""AMD's AITER kernels for moe_core. Import nothing from here: moe_core loads what a plan needs."""
