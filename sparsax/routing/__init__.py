"""Which tokens go through which blocks of a feed-forward layer, and how blocks and router arise."""

from sparsax.routing.balance import Utilisation as Utilisation
from sparsax.routing.balance import balance_loss as balance_loss
from sparsax.routing.balance import update_bias as update_bias
from sparsax.routing.balance import utilisation as utilisation
from sparsax.routing.plan import RoutingPlan as RoutingPlan
from sparsax.routing.plan import route_top_k as route_top_k
from sparsax.routing.router import RouterFit as RouterFit
from sparsax.routing.router import captured as captured
from sparsax.routing.router import fit_router as fit_router
from sparsax.routing.split import co_activation as co_activation
from sparsax.routing.split import split_ffn as split_ffn
from sparsax.routing.weights import FFNBlocks as FFNBlocks
from sparsax.routing.weights import FFNLoRA as FFNLoRA
