"""Compound attention: all parts, global rows too, in one launch of the block-sparse kernels."""

from sparsax.pallas.compound.attention import backward as backward
from sparsax.pallas.compound.attention import forward as forward
from sparsax.pallas.compound.attention import refusal as refusal
