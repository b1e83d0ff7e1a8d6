"""The routed feed-forward layer: arguments, which implementation runs, the gradient."""

import dataclasses
import typing
from functools import partial

import jax
from jaxtyping import Array, Float

from sparsax import checks, pallas, reference, xla
from sparsax.linear import ACTIVATIONS, Activation
from sparsax.routing import FFNBlocks, FFNLoRA, RoutingPlan
from sparsax.typing import Implementation


def routed_ffn(
    x: Float[Array, "*B D"],
    weights: FFNBlocks,
    plan: RoutingPlan,
    *,
    activation: Activation,
    lora: FFNLoRA | None = None,
    frozen: bool = False,
    recompute: bool = True,
    implementation: Implementation | None = None,
) -> Float[Array, "*B D"]:
    """Every token through the blocks of the feed-forward layer that its plan lists.

    `y = sum over chosen g of c_g act(x w_up[g] + b_up[g]) w_down[g], + b_down`, gated when the
    weights have a gate. Work is that of the chosen blocks. With all blocks chosen and coefficients
    of 1 it is the dense layer. The backward pass computes the hidden units again, unless
    `recompute=False`: x, the plan and the weights are all that is kept for it. Differentiable in x,
    weights, LoRA and coefficients; works under jit, vmap, scan and shard_map, where tokens may be
    sharded, each shard with a plan of its own tokens.

    Args:
        x: tokens `[*B, D]`, float32, bfloat16 or float16; sums are float32.
        weights: from `sparsax.split_ffn`, in x's dtype (see `FFNBlocks.astype`).
        plan: from `sparsax.route_top_k`, for the same tokens.
        activation: "relu", "silu", "gelu" (tanh) or "gelu_exact".
        lora: low-rank additions to the matrices, in x's dtype.
        frozen: the weights get no gradient, and none is computed.
        recompute: whether the backward pass computes the products with w_up and w_gate again. False
            keeps them from the forward pass: M * E numbers each in x's dtype, for M = B * k choices
            and E units of a block, k / G of what the dense layer keeps of its own. Both passes then
            do 6 large products instead of 7 (4 instead of 5 with LoRA and frozen weights; gated 9
            for 11, 6 for 8). What is kept is rounded to x's dtype before the activation, which the
            kernels' forward pass without a gradient does not do. Without a gradient nothing is
            kept. "reference" always keeps all, and so may XLA with "xla" where both passes are one
            program, whose equal products it merges.
        implementation: "reference" (dense, float32), "xla" (any device), "pallas" (Hopper GPUs:
            bfloat16 or float16, features D and units E of a block in multiples of 64, any
            activation but "gelu_exact"), or None for "pallas" where it can run and "xla" elsewhere.
            A name runs or raises.

    Returns:
        `[*B, D]` in x's dtype; 0 for tokens that the plan's mask left out, whatever they hold.

    Raises:
        ValueError: shapes, dtypes or a name are wrong.
        NotImplementedError: the named implementation cannot do this.

    Source: Gui et al., "SPT: Fine-Tuning Transformer-based Language Models Efficiently with
    Sparsification" (arXiv 2312.10365), section 4.2.

    Example:
        >>> import jax
        >>> import sparsax
        >>> w_up, w_down, x = jax.random.normal(jax.random.key(0), (3, 16, 16))
        >>> weights = sparsax.split_ffn(w_up, w_down, 4)
        >>> plan = sparsax.route_top_k(jax.nn.sigmoid(x[:, :4]), 4)
        >>> y = sparsax.routed_ffn(x, weights, plan, activation="relu")
        >>> bool(abs(y - jax.nn.relu(x @ w_up) @ w_down).max() < 1e-3)
        True
    """
    checks.one_of("activation", activation, ACTIVATIONS)
    checks.one_of("recompute", recompute, (True, False))
    checks.ffn_inputs(x, weights, plan, lora)
    refusal = pallas.routed_refusal(x.dtype, x.shape[-1], weights.w_up.shape[-1], activation)
    chosen = checks.implementation(implementation, "xla" if refusal else "pallas")
    if chosen == "pallas":
        checks.kernel_runs(refusal)
    if frozen:
        weights = jax.lax.stop_gradient(weights)
    shape, coefficients = x.shape, plan.coefficients.reshape(-1, plan.active)
    flat = dataclasses.replace(
        plan, blocks=plan.blocks.reshape(-1, plan.active), coefficients=coefficients
    )
    x = flat.zeroed(x.reshape(-1, shape[-1]))
    if chosen == "reference":
        y = reference.routed_ffn(
            x, weights, lora, flat.blocks, coefficients, scaled=plan.scaled,
            activation=ACTIVATIONS[activation],
        )  # fmt: skip
    else:
        leaves, tree = jax.tree.flatten((x, weights, lora, flat))
        arrays = jax.tree.unflatten(tree, xla.vary_alike(tuple(leaves)))
        call = _Call(activation, frozen, recompute, chosen == "pallas", pallas.interpret())
        y = typing.cast(jax.Array, _routed(call, *arrays))
    return y.astype(x.dtype).reshape(shape)


class _Call(typing.NamedTuple):
    """The static part of a call."""

    activation: str
    frozen: bool
    recompute: bool
    kernels: bool
    interpret: typing.Any

    def products(self, x) -> xla.RoutedProducts:
        """What multiplies the rows of the tokens x."""
        if not self.kernels:
            return xla.ROUTED_PRODUCTS
        kernels = pallas.RoutedKernels(self.activation, self.interpret)

        def vary(run):
            """A kernel's results vary over no mesh axis."""

            def varying(*operands, **options):
                leaves, tree = jax.tree.flatten(run(*operands, **options))
                return jax.tree.unflatten(tree, xla.vary_alike(tuple(leaves), x))

            return varying

        runs = kernels.gmm, kernels.tgmm, kernels.hidden, kernels.hidden_gradient
        return xla.RoutedProducts(*map(vary, runs), sums_terms=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(call: _Call, x, weights, lora, plan):
    return _forward(call, x, weights, lora, plan)


def _forward(call, x, weights, lora, plan, kept=None):
    return xla.routed_ffn_forward(
        x, weights, lora, plan, call.products(x), activation=ACTIVATIONS[call.activation],
        kept=kept,
    )  # fmt: skip


def _routed_fwd(call, x, weights, lora, plan):
    given = x, weights, lora, plan
    if call.recompute:
        return _routed(call, *given), (*given, None)
    kept = xla.routed_ffn_keep(*given, call.products(x))
    return _forward(call, *given, kept), (*given, kept)


def _routed_bwd(call, residuals, dy):
    x, weights, lora, plan, kept = residuals
    dy = plan.zeroed(dy)
    dx, dweights, dlora, dcoefficients = xla.routed_ffn_backward(
        x, weights, lora, plan, dy, call.products(x), activation=ACTIVATIONS[call.activation],
        frozen=call.frozen, kept=kept,
    )  # fmt: skip
    nothing = dict.fromkeys(("blocks", "order", "position", "group_sizes"))
    return dx, dweights, dlora, dataclasses.replace(plan, coefficients=dcoefficients, **nothing)


_routed.defvjp(_routed_fwd, _routed_bwd)
