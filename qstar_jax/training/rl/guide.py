"""Opens the DPO run whose token rewards are added to what samples earn."""

from functools import partial

from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.console import say
from qstar_jax.errors import InputError
from qstar_jax.store.identity import weights_identity
from qstar_jax.store.open import load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.training.guide import check_guide
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.rl.rewards import Guide
from qstar_jax.training.setup import Start


def open_guide(plan: RunPlan, start: Start, mesh: Mesh, console: Console) -> Guide | None:
    """Opens `reward.guide`; its reference stays on disk where it is that of this run.

    Raises:
        InputError: If the guide is no run with a reference, or has other tokens.
    """
    name, config = plan.config.reward.guide, plan.config
    if name is None:
        return None
    load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
    policy = load(name)
    check_guide(policy, start, name, "reward.guide")
    beta = find_beta(policy, None, name, "reward.guide to a run that does")
    recorded = policy.description.comparable(config.compute, policy.description.reference)
    identity = weights_identity(policy.model, policy.params).partition(" ")[0]
    say(console, f"guide: token rewards of {name}, beta {beta:g}")
    # At another temperature the run compares itself with another distribution.
    if recorded is not None and recorded == start.reference and config.rl.temperature == 1:
        return Guide(policy.model, policy.params, None, None, beta, identity)
    reference = open_reference(policy, None, name, load)
    if reference.model.config.vocab_size != policy.model.config.vocab_size:
        raise InputError(f"reward.guide {name} and its reference have vocabularies of different sizes")
    return Guide(policy.model, policy.params, reference.model, reference.params, beta, identity)
