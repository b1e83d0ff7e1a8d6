"""The rules that `sparsax.sparsify` applies."""

from sparsax.rules.lora import LoRA as LoRA
from sparsax.rules.observer import InputObserver as InputObserver
from sparsax.rules.routed import Routed as Routed
from sparsax.rules.top_l import TopL as TopL
from sparsax.rules.tsvd import TSVD as TSVD
from sparsax.rules.tsvd import GramObserver as GramObserver
from sparsax.rules.tsvd import TSVDCommon as TSVDCommon
