"""Options of Monte-Carlo tree search."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qstar_jax.decoding.arguments import token_id_tuple


@dataclass(frozen=True)
class MctsOptions:
    """Sizes of trees, and how their actions are chosen.

    Attributes:
        max_new_tokens: Longest response T, EOS included.
        eos_ids: Tokens that end a response; kept as a tuple.
        num_simulations: Number of simulations; each makes one node at most.
        num_actions: Most likely tokens A that a node considers; all tokens of a smaller vocabulary.
        policy: Rule by which actions are chosen. `puct`: as in MuZero. `gumbel`: sequential halving at the root, and
            visits that follow an improved policy below.
        n_best: Number of responses returned; None for as many as there are simulations.
        pb_c_init: With puct: weight of the prior.
        pb_c_base: With puct: visits at which that weight begins to grow.
        gumbel_scale: With gumbel: scale of the noise at the root; at 0 there is no noise and no key.
        considered: With gumbel: actions of the root that are visited at all.
        value_scale: With gumbel: weight of values against log-probabilities.
        visit_init: With gumbel: added to the visits of the most visited action in that weight.
    """

    max_new_tokens: int
    eos_ids: Sequence[int]
    num_simulations: int
    num_actions: int
    policy: Literal["puct", "gumbel"] = "puct"
    n_best: int | None = None
    pb_c_init: float = 1.25
    pb_c_base: float = 19652.0
    gumbel_scale: float = 1.0
    considered: int = 16
    value_scale: float = 0.1
    visit_init: float = 50.0

    def __post_init__(self):
        """Refuses values that have no meaning or no effect."""
        object.__setattr__(self, "eos_ids", token_id_tuple("eos_ids", self.eos_ids))
        sizes = ("max_new_tokens", "num_simulations", "num_actions", "considered")
        too_small = [name for name in sizes if getattr(self, name) < 1]
        unread = _PUCT_ONLY if self.policy == "gumbel" else _GUMBEL_ONLY
        unread = [name for name in unread if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        message = None
        if too_small:
            message = f"{too_small[0]} {getattr(self, too_small[0])}: expected at least 1"
        elif self.policy not in ("puct", "gumbel"):
            message = f"policy {self.policy!r}: expected 'puct' or 'gumbel'"
        elif unread:
            message = f"{unread[0]} {getattr(self, unread[0])} has no effect with policy {self.policy!r}"
        elif self.n_best is not None and not 1 <= self.n_best <= self.num_simulations:
            message = (
                f"n_best {self.n_best}: expected 1 to num_simulations {self.num_simulations}, as each simulation finds "
                "one response at most"
            )
        elif self.pb_c_base <= 0 or self.gumbel_scale < 0:
            message = f"pb_c_base {self.pb_c_base} must be above 0, gumbel_scale {self.gumbel_scale} at least 0"
        if message:
            raise ValueError(message)


_PUCT_ONLY = ("pb_c_init", "pb_c_base")
_GUMBEL_ONLY = ("gumbel_scale", "considered", "value_scale", "visit_init")
