"""Measuring a model: generation, the offline refusal judge, rates with intervals, capability, routing drift."""
