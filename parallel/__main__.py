"""Train on several ranks: `torchrun --nproc-per-node N -m fusemlp.parallel --tp T --dp D --pp P [training options]`."""

import sys
from contextlib import suppress

from .training.command import main

if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
