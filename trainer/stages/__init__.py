"""The two training stages: expert repair and routing consistency. A stage knows nothing of other stages."""
