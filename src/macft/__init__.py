"""macft: distributed LoRA fine-tuning of language models on a small cluster of Macs.

Importing any part of macft first puts a fast BLAS in place for MLX (Linux only, see :mod:`macft.device.blas`);
this has to happen before the first ``import mlx.core`` anywhere in the process, which is why it is done here.
"""

import logging

from macft.device import blas

__version__ = "0.1.0"

# Without a log file, Python would print warnings to the console.
logging.getLogger("macft").addHandler(logging.NullHandler())
blas.preload()
