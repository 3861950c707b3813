"""Contrastive preference learning for control: policies over continuous actions, trained on segments of behaviour.

A policy that learns from preferences by regret is an advantage function, alpha log pi(a | s) = A*(s, a), for robots as
for tokens. `lqr` has tasks whose optimum is known in closed form, `meta_world` a simulated robot arm.
"""
