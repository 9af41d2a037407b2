"""`training/train.py` under FSDP2 on the CPU, where accelerate takes DDP whatever the launcher was told.

    accelerate launch --use_fsdp ... tests/training/sharded.py --use_cpu ...

The rest is accelerate's and torch's own: parameters, gradients and optimizer are divided, over gloo.
"""

import sys
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from longclip_hf.training import train

original = AcceleratorState.__init__


def divided(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    self.__dict__.setdefault("fsdp_plugin", fsdp_plugin)
    self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = divided  # type: ignore[method-assign]
    sys.exit(train.main())
