// The operators for torch: checks, memory formats, autograd. All in one source, since torch's headers take the longest
// to compile.

#include "cell_cuda_operators.h"
#include "cell_operators.h"
#include "convolution_operators.h"
#include "depthwise_operators.h"
#include "dropout_operators.h"
#include "mixed_operators.h"
