"""Product quantisation: short codes of queries and keys, and integer scores of their pairs."""

from sparsax.quantise.codes import Codes as Codes
from sparsax.quantise.codes import Score as Score
from sparsax.quantise.quantizer import ProductQuantizer as ProductQuantizer
from sparsax.quantise.quantizer import QuantizerStats as QuantizerStats
