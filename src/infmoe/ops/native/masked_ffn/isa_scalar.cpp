#define INFMOE_ISA scalar
#include "impl.h"
