"""Time one layer at growing batch sizes and read from the roofline what limits it.

A layer is launch-bound while starting it takes longer than its work, memory-bound while it does fewer floating-point
operations for each byte than the ridge of the machine, and compute-bound beyond. More than 100% of the roofline means
that a cache held what the roofline counts as read from memory.
"""

import torch
from fusemlp.bench.cases import LayerCase
from fusemlp.bench.roofline import achieved, layer_fusemlp, layer_host_us, layer_work, measure_ceilings
from fusemlp.bench.timing import default_device, measure_on_device, side_stream

device = default_device()
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
batches = (1, 256, 8192) if device.type == "cuda" else (1, 16, 128)
ceilings = measure_ceilings(dtype, device, quick=True)
print(
    f"{device.type}: {ceilings.gemm_tflops:.3g} TFLOP/s, {ceilings.copy_gb_s:.3g} GB/s, "
    f"ridge at {ceilings.ridge:.3g} FLOP per byte"
)

tiny = LayerCase("2 -> 2", 1, 2, 2, dtype=dtype)
large = [LayerCase("4096 -> 4096", rows, 4096, 4096, dtype=dtype) for rows in batches]
for case in (tiny, *large):
    work = layer_work(case, "forward")
    with side_stream(device):
        timing = measure_on_device(
            lambda number, case=case: {"fusemlp": layer_fusemlp(case, "forward", device, number)},
            work.bytes,
            device,
            seconds=0.05,
        )["fusemlp"]
        host_us = layer_host_us(case, "forward", device)
    point = achieved(work, timing.median_ms, host_us, ceilings)
    least_us = 1e3 * ceilings.roofline_ms(work)
    why = {
        "launch": f"starting it takes {host_us:.3g} us, its work at least {least_us:.3g} us",
        "memory": f"{work.intensity:.3g} FLOP per byte, below the ridge",
        "compute": f"{work.intensity:.3g} FLOP per byte, beyond the ridge",
    }[str(point["regime"])]
    print(
        f"{case.name}, {case.rows} rows: {point['median_ms']:.3g} ms, {point['roofline_percent']:.0f}% of the "
        f"roofline, {point['regime']}-bound: {why}"
    )
