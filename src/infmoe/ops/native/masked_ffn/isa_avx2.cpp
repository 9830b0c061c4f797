#define INFMOE_ISA avx2
#include "impl.h"
