"""Look at a run's checkpoints, offline; see --help."""

import sys

from megavit.launch.checkpoints import main

if __name__ == "__main__":
    sys.exit(main())
