"""Kernels for NVIDIA Hopper GPUs (Pallas, Mosaic GPU). Arrays and static ints in."""

from sparsax.pallas import compound as compound
from sparsax.pallas import top_l as top_l
from sparsax.pallas.block_sparse.attention import asks_lists as asks_lists
from sparsax.pallas.block_sparse.attention import backward as backward
from sparsax.pallas.block_sparse.attention import forward as forward
from sparsax.pallas.grouped_matmul import gmm as gmm
from sparsax.pallas.grouped_matmul import gmm_sum as gmm_sum
from sparsax.pallas.grouped_matmul import grouped_refusal as grouped_refusal
from sparsax.pallas.grouped_matmul import tgmm as tgmm
from sparsax.pallas.routed_ffn import RoutedKernels as RoutedKernels
from sparsax.pallas.routed_ffn import routed_refusal as routed_refusal
from sparsax.pallas.score_map import score_map as score_map
from sparsax.pallas.score_map import score_map_refusal as score_map_refusal
from sparsax.pallas.support import interpret as interpret
from sparsax.pallas.support import interpreted as interpreted
from sparsax.pallas.support import lowering as lowering
from sparsax.pallas.support import on_hopper as on_hopper
from sparsax.pallas.support import refusal as refusal
from sparsax.pallas.tsvd import as_tiles as as_tiles
from sparsax.pallas.tsvd import shapes_as_tiles as shapes_as_tiles
from sparsax.pallas.tsvd import tsvd_backward as tsvd_backward
from sparsax.pallas.tsvd import tsvd_common_forward as tsvd_common_forward
from sparsax.pallas.tsvd import tsvd_common_is_faster as tsvd_common_is_faster
from sparsax.pallas.tsvd import tsvd_forward as tsvd_forward
from sparsax.pallas.tsvd import tsvd_is_faster as tsvd_is_faster
from sparsax.pallas.tsvd import tsvd_refusal as tsvd_refusal
