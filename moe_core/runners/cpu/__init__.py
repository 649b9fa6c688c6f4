"""The CPU runner: experts as oneDNN matrix products on packed weights."""
