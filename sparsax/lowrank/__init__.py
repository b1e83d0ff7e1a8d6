"""What is kept of a dense matrix: factors of its tiles, and how they are chosen."""

from sparsax.lowrank.budget import TILES as TILES
from sparsax.lowrank.budget import TileChoice as TileChoice
from sparsax.lowrank.budget import choose_tiles as choose_tiles
from sparsax.lowrank.decompose import tsvd as tsvd
from sparsax.lowrank.decompose import tsvd_common as tsvd_common
from sparsax.lowrank.factors import CommonFactors as CommonFactors
from sparsax.lowrank.factors import Side as Side
from sparsax.lowrank.factors import TiledFactors as TiledFactors
from sparsax.lowrank.svd import randomized_svd as randomized_svd
