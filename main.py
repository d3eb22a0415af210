"""The command line of a checkout: ``python main.py VERB``; an installed package calls the same code `sarathi-jax`."""

import sys

from sarathi_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
