"""Portable sparse XLA: real savings on CPUs, TPUs and any GPU. Arrays and static ints in."""

from sparsax.xla import compound as compound
from sparsax.xla.block_sparse_attention import backward as backward
from sparsax.xla.block_sparse_attention import forward as forward
from sparsax.xla.grouped_matmul import gmm as gmm
from sparsax.xla.grouped_matmul import group_sums as group_sums
from sparsax.xla.grouped_matmul import tgmm as tgmm
from sparsax.xla.pruned_counts import pruned_counts as pruned_counts
from sparsax.xla.routed_ffn import ROUTED_PRODUCTS as ROUTED_PRODUCTS
from sparsax.xla.routed_ffn import RoutedProducts as RoutedProducts
from sparsax.xla.routed_ffn import routed_ffn_backward as routed_ffn_backward
from sparsax.xla.routed_ffn import routed_ffn_forward as routed_ffn_forward
from sparsax.xla.routed_ffn import routed_ffn_keep as routed_ffn_keep
from sparsax.xla.score_map import score_map as score_map
from sparsax.xla.top_l import top_l_backward as top_l_backward
from sparsax.xla.top_l import top_l_forward as top_l_forward
from sparsax.xla.tsvd_matmul import tsvd_backward as tsvd_backward
from sparsax.xla.tsvd_matmul import tsvd_common_backward as tsvd_common_backward
from sparsax.xla.tsvd_matmul import tsvd_common_forward as tsvd_common_forward
from sparsax.xla.tsvd_matmul import tsvd_common_hidden as tsvd_common_hidden
from sparsax.xla.tsvd_matmul import tsvd_forward as tsvd_forward
from sparsax.xla.walk import vary_alike as vary_alike
from sparsax.xla.walk import varying_zero as varying_zero
