#define INFMOE_ISA avx512
#include "experts_impl.h"
