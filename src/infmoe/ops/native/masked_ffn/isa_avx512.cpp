#define INFMOE_ISA avx512
#include "impl.h"
