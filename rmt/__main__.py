"""`python -m rmt`, as torchrun wants it: `torchrun --nproc-per-node 2 -m rmt train ...`."""

import sys

from .cli import main

sys.exit(main())
