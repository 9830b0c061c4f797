#define INFMOE_ISA avx2
#include "experts_impl.h"
