"""`python -m trainer` is the command `routealign`."""

from trainer.cli import main

if __name__ == "__main__":
    main()
