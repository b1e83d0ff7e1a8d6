"""Compound attention in portable sparse XLA: a part at a time, joined by their log-sum-exp."""

from sparsax.xla.compound.attention import backward as backward
from sparsax.xla.compound.attention import forward as forward
from sparsax.xla.compound.attention import rows_backward as rows_backward
from sparsax.xla.compound.attention import rows_forward as rows_forward
