"""Train: `deepspeed launch/train.py --deepspeed_config ds_configs/zero3.json [flags]`; see --help."""

import sys

from megavit.launch.train import main

if __name__ == "__main__":
    sys.exit(main())
