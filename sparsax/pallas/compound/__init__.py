"""Compound attention: bands, blocks and packed keys in one launch of the block-sparse kernels."""

from sparsax.pallas.compound.attention import backward as backward
from sparsax.pallas.compound.attention import forward as forward
from sparsax.pallas.compound.attention import refusal as refusal
from sparsax.pallas.compound.rows import rows_backward as rows_backward
from sparsax.pallas.compound.rows import rows_forward as rows_forward
