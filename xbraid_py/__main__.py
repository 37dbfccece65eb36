"""`python -m xbraid_py COMMAND`, the same as `xbraid-py COMMAND`."""

import sys

from xbraid_py.cli import main

if __name__ == "__main__":
    sys.exit(main())
