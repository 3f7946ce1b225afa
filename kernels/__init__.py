"""The mixed operation and the cells of differentiable architecture search, fused: forward and backward, CPU and CUDA.

    from kernels import mixed_sum, mixed_norm_sum, separable, pool, cell, fuse

    y = mixed_sum(outputs, probabilities)           # sum_k probabilities[k] * outputs[k]
    y = mixed_norm_sum(outputs, probabilities, norms, training=True)
                                                    # sum_k probabilities[k] * batch_norm_k(outputs[k])
    y = separable(x, depthwise, pointwise)          # pointwise(depthwise(relu(x)))
    y = pool(x, "max")                              # over 3x3 windows, or "avg"
    network = fuse(network)                         # a built network computes by these from now on

The folder works alone, copied into any project. README.md is its manual.
"""

from .fuse import Report, fuse, report
from .modules import unfuse
from .ops import cell, dropout_key, dropout_masks, mixed_norm_sum, mixed_sum, pool, separable
from .program import Dropout, FactorizedReduce, Norm, Pool, Separable, Sum
from .reference import (
    cell_ref,
    dropout_masks_ref,
    mixed_norm_sum_ref,
    mixed_sum_ref,
    philox_ref,
    pool_ref,
    separable_ref,
)
from .runtime import CUDA_OPERATIONS, fused, load, supports, use, use_on_cuda

__all__ = ["cell", "cell_ref", "dropout_key", "dropout_masks", "dropout_masks_ref", "fuse", "fused", "load"]
__all__ += ["mixed_norm_sum", "mixed_norm_sum_ref", "mixed_sum", "mixed_sum_ref", "philox_ref", "pool"]
__all__ += ["pool_ref", "separable", "separable_ref", "supports", "use", "use_on_cuda", "CUDA_OPERATIONS", "Dropout"]
__all__ += ["FactorizedReduce", "Norm", "Pool", "Report", "Separable", "Sum", "report", "unfuse"]
