"""`python -m trainer` is the command `routealign`."""

from trainer.cli.app import main

if __name__ == "__main__":
    main()
