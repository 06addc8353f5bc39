"""Train a multilayer perceptron on a table: `python -m fusemlp.mlp --help`."""

import sys

from .training.command import main

if __name__ == "__main__":
    sys.exit(main())
