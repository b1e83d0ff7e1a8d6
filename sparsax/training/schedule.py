"""When to stop training densely: SPION's transition rule as a pure state machine."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScheduleState:
    """What the rule remembers between two probes.

    Attributes:
        maps: score maps of the last probe, float32 `[L, P, T, T]`.
        distance: how far the maps moved between the last two probes, `[L]`; NaN before that.
        probes: number of probes seen.
    """

    maps: Float[Array, "L P T T"]
    distance: Float[Array, " L"]
    probes: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Dense until the score maps settle, then sparse.

    Yoon et al., SPION (PAKDD 2024), section 4.4: every `probe_every` steps the maps A_e of all
    layers are compared with those of the probe before, `d_e = ||A_e - A_(e-1)||_F`, and training
    turns sparse when `|d_e - d_(e-1)| / d_(e-1) < tolerance` holds for every layer.

    Args:
        probe_every: steps between two probes.
        max_dense_steps: the step at which training turns sparse in any case.
        tolerance: relative change of the distance that counts as settled.

    Example:
        >>> import jax
        >>> from sparsax.training import Schedule
        >>> schedule = Schedule(probe_every=10, max_dense_steps=1000)
        >>> maps = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 1, 8, 8)))
        >>> state = schedule.init(maps.shape)
        >>> for scale in (1.0, 1.5, 2.0, 2.5):  # the maps move by the same distance every time
        ...     state, settled = schedule.observe(state, scale * maps)
        ...     print(bool(settled))
        False
        False
        True
        True
    """

    probe_every: int = 500
    max_dense_steps: int = 10_000
    tolerance: float = 0.15

    def __post_init__(self):
        if min(self.probe_every, self.max_dense_steps) < 1 or self.tolerance <= 0:
            raise ValueError(
                "probe_every and max_dense_steps must be at least 1 and tolerance positive; got "
                f"{self.probe_every}, {self.max_dense_steps}, {self.tolerance}."
            )

    def init(self, shape: tuple[int, int, int, int]) -> ScheduleState:
        """The state before the first probe of maps of shape `[L, P, T, T]`."""
        # Of the types that `observe` gives, which is compiled once then.
        nan = jnp.full(shape[0], jnp.nan, jnp.float32)
        return ScheduleState(maps=jnp.zeros(shape), distance=nan, probes=jnp.int32(0))

    def probes(self, step: int) -> bool:
        """Whether to take the score maps after `step` optimizer steps (counted from 1)."""
        return step % self.probe_every == 0 or step == self.max_dense_steps

    def forced(self, step: int) -> bool:
        """Whether training turns sparse after `step` steps, settled or not."""
        return step >= self.max_dense_steps

    def observe(
        self, state: ScheduleState, maps: Float[Array, "L P T T"]
    ) -> tuple[ScheduleState, Bool[Array, ""]]:
        """The next state, and whether every layer's maps have settled. Pure; works under jit.

        The first probe has nothing to compare with and the second no distance before it, so the
        third is the first that can settle. Maps that do not move at all count as settled.
        """
        moved = jnp.sqrt(((maps - state.maps) ** 2).sum((1, 2, 3)))
        distance = jnp.where(state.probes > 0, moved, jnp.nan)
        change = jnp.abs(distance - state.distance)
        settled = (change < self.tolerance * state.distance) | ((change == 0) & (distance == 0))
        return ScheduleState(maps, distance, state.probes + 1), settled.all()
