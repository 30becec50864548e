"""Export a run's weights: `python launch/export.py RUN_DIR OUT`; see --help."""

import sys

from megavit.launch.export import main

if __name__ == "__main__":
    sys.exit(main())
