"""The embedded organism: a tiny MoE with a planted flaw, trained from a seed on generated text (docs/organism.md)."""
