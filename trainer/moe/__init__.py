"""A small library about Mixture-of-Experts layers in transformers models; usable without the rest of the project.

Shape suffixes used throughout: T tokens (batch x positions), E routed experts, K experts chosen per token,
N critical experts of one layer, D hidden size, F intermediate size, L MoE layers.
"""
