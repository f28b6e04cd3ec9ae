#include "kernels.h"
#include "telemetry.cuh"

namespace onepass::cuda {
const TelemetryKernels kTelemetryKernels{measure_skipped, total_telemetry};
}
