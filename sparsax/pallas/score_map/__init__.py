"""The probability map of dense attention, averaged on the chip: two passes over the keys."""

from sparsax.pallas.score_map.passes import score_map as score_map
from sparsax.pallas.score_map.passes import score_map_refusal as score_map_refusal
