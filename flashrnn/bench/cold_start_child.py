"""The fresh process of ``cold_start.py``: prints the seconds of each stage."""

import json
import sys
import time

begun = time.perf_counter()


def lap() -> float:
    """Seconds since the last lap."""
    global begun
    before, begun = begun, time.perf_counter()
    return begun - before


def main(request: str) -> list[float]:
    """Start PyTorch, compute forward, do a training step."""
    import torch

    asked = json.loads(request)
    device, dtype = torch.device(asked["device"]), getattr(torch, asked["dtype"])
    B, T, N, D = (asked[name] for name in "BTND")

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return lap()

    torch.ones(1, device=device).sum()
    stages = [finish()]

    from flashrnn import flashrnn
    from flashrnn.cells import resolve

    cell = resolve(asked["function"])
    Gw, Gr, Gb = (len(cell.fed_by(source)) for source in ("Wx", "R", "b"))
    Wx, R, b = (
        torch.randn(shape, device=device).to(dtype).requires_grad_()
        for shape in ((B, T, Gw, N, D), (Gr, N, D, D), (Gb, N, D))
    )

    def run() -> torch.Tensor:
        states, _ = flashrnn(Wx, R, b, function=asked["function"], backend=asked["backend"])
        return states[0]

    with torch.no_grad():
        run()
    stages.append(finish())
    run().sum().backward()
    stages.append(finish())
    return stages


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
