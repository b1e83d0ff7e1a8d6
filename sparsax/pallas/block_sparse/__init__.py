"""Block-sparse attention: from block lists to row tiles, their schedule, and the kernels."""
