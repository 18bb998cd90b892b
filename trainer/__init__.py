"""RouteAlign: repair the safety-critical experts of Mixture-of-Experts language models."""

__version__ = "0.1.0"
