"""bitsandbytes' CPU functions on a 14336 x 4096 matrix, as GB/s of the unquantised side, to stand beside `cargo bench -p nibble-nf4`.

Usage: python bench_nf4_peer.py   (pip install torch bitsandbytes)
"""
import time

import bitsandbytes.functional as F
import torch

torch.set_num_threads(2)
weights = torch.randn(14336, 4096) * 0.02


def rate(name, bytes_, run):
    run()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    print(f"bitsandbytes {name}: {bytes_ / sorted(times)[2] / 1e9:.2f} GB/s", flush=True)


for dtype in (torch.float32, torch.bfloat16):
    x = weights.to(dtype)
    size = x.numel() * x.element_size()
    name = str(dtype).removeprefix("torch.")
    packed, state = F.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
    rate(f"quantize {name}", size, lambda: F.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4"))
    rate(f"dequantize {name}", size, lambda: F.dequantize_4bit(packed, state))
    rate(f"copy {name}", size, lambda: x.clone())
