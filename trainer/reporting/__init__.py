"""The report of a run, made from the artefacts in its folder and nothing else."""
