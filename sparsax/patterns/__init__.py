"""Who attends to whom: returns a `BlockPattern`, or a `CompoundPattern` in `compound`."""

from sparsax.patterns import compound as compound
from sparsax.patterns import mass as mass
from sparsax.patterns import quality as quality
from sparsax.patterns import spion as spion
from sparsax.patterns import topl as topl
from sparsax.patterns.sensitivity import layer_weights as layer_weights
from sparsax.patterns.static import bigbird as bigbird
from sparsax.patterns.static import causal as causal
from sparsax.patterns.static import diagonal as diagonal
from sparsax.patterns.static import dilated as dilated
from sparsax.patterns.static import full as full
from sparsax.patterns.static import global_tokens as global_tokens
from sparsax.patterns.static import random as random
from sparsax.patterns.static import sliding_window as sliding_window
from sparsax.patterns.static import vertical_slash as vertical_slash
