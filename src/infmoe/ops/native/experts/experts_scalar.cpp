#define INFMOE_ISA scalar
#include "experts_impl.h"
