// The operators for torch: schemas, checks, memory formats, autograd. All in one source, since torch's headers take the
// longest to compile.

#include "cell.h"
#include "cell_cuda.h"
#include "dropout.h"
#include "mixed.h"
