"""Every operation once more in plain dense float32: the oracle of the tests."""

from sparsax.reference.attention import block_sparse_attention as block_sparse_attention
from sparsax.reference.attention import score_map as score_map
from sparsax.reference.compound import compound_attention as compound_attention
from sparsax.reference.ffn import routed_ffn as routed_ffn
from sparsax.reference.grouped import gmm as gmm
from sparsax.reference.grouped import tgmm as tgmm
from sparsax.reference.linear import tsvd_common_matmul as tsvd_common_matmul
from sparsax.reference.linear import tsvd_matmul as tsvd_matmul
from sparsax.reference.top_l import top_l_attention as top_l_attention
