"""Plan a run before the nodes are rented; see --help."""

import sys

from megavit.launch.plan import main

if __name__ == "__main__":
    sys.exit(main())
