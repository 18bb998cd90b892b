"""One file per seed system, reading top to bottom like its paper."""
