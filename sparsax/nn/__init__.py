"""Flax modules: parameters plus one functional call each."""

from sparsax.nn.attention import Pattern as Pattern
from sparsax.nn.attention import ScoreMap as ScoreMap
from sparsax.nn.attention import SparseAttention as SparseAttention
from sparsax.nn.attention import attention_fn as attention_fn
from sparsax.nn.attention import get_patterns as get_patterns
from sparsax.nn.attention import score_maps as score_maps
from sparsax.nn.attention import set_patterns as set_patterns
from sparsax.nn.bert import Bert as Bert
from sparsax.nn.bert import BertConfig as BertConfig
from sparsax.nn.longformer import LongformerSelfAttention as LongformerSelfAttention
from sparsax.nn.surgery import named_modules as named_modules
from sparsax.nn.surgery import replace_modules as replace_modules
from sparsax.nn.transformer import Block as Block
from sparsax.nn.transformer import Classifier as Classifier
from sparsax.nn.transformer import Decoder as Decoder
from sparsax.nn.transformer import Encoder as Encoder
from sparsax.nn.tsvd import CommonParam as CommonParam
from sparsax.nn.tsvd import TSVDCommonLinear as TSVDCommonLinear
from sparsax.nn.tsvd import TSVDLinear as TSVDLinear
