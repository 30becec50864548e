"""Write, index and check WebDataset shards; see --help."""

import sys

from megavit.launch.shards import main

if __name__ == "__main__":
    sys.exit(main())
