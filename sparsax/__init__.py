"""Transformers made cheaper by sparsity: JAX/Flax modules with kernels for Hopper GPUs."""

from sparsax import compound as compound
from sparsax import nn as nn
from sparsax import patterns as patterns
from sparsax import peft as peft
from sparsax import rules as rules
from sparsax.attention import block_sparse_attention as block_sparse_attention
from sparsax.attention import default_implementation as default_implementation
from sparsax.attention import score_map as score_map
from sparsax.compound import Band as Band
from sparsax.compound import CompoundPattern as CompoundPattern
from sparsax.convert import sparsify as sparsify
from sparsax.grouped import gmm as gmm
from sparsax.grouped import tgmm as tgmm
from sparsax.layouts import BlockPattern as BlockPattern
from sparsax.linear import tsvd_common_matmul as tsvd_common_matmul
from sparsax.linear import tsvd_matmul as tsvd_matmul
from sparsax.lowrank import CommonFactors as CommonFactors
from sparsax.lowrank import TileChoice as TileChoice
from sparsax.lowrank import TiledFactors as TiledFactors
from sparsax.lowrank import choose_tiles as choose_tiles
from sparsax.lowrank import tsvd as tsvd
from sparsax.lowrank import tsvd_common as tsvd_common
from sparsax.multigrain import compound_attention as compound_attention
from sparsax.slices import SlicePlan as SlicePlan
from sparsax.slices import slice_plan as slice_plan
