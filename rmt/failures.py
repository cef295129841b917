"""What ends a command, or one run of many, in one line: anything else is a fault of ours and shows its traceback."""

from torch import OutOfMemoryError

from rmt_kernels import BackendUnavailable

from .config import UserError

# OSError: a full disk, a folder without permission, a file that went away.
FAILURES = (UserError, OSError, BackendUnavailable, OutOfMemoryError)
