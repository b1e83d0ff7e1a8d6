"""Top-L attention: the block-sparse kernels over all blocks, with a rule that reads codes."""

from sparsax.pallas.top_l.attention import backward as backward
from sparsax.pallas.top_l.attention import forward as forward
from sparsax.pallas.top_l.attention import refusal as refusal
from sparsax.pallas.top_l.select import select as select
from sparsax.pallas.top_l.vote import votes as votes
from sparsax.pallas.top_l.vote import votes_refusal as votes_refusal
