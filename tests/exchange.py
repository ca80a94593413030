"""Run by test_distribution.py under `accelerate launch` in two processes: `exchange.py OUTPUT_DIR` lets them exchange
gradients, parameters and work, and each writes what it then has as OUTPUT_DIR/N.pt."""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

from glance.training import distribution  # noqa: E402


accelerator = Accelerator()
rank = accelerator.process_index
parameters = [torch.nn.Parameter(torch.full((2,), float(10 * rank + number))) for number in range(4)]
# Gradients on both processes, on the second alone, on neither, and one that overflowed on the second.
for number, gradients in enumerate([(1.0, 3.0), (None, 4.0), (None, None), (1.0, torch.inf)]):
    if gradients[rank] is not None:
        parameters[number].grad = torch.full((2,), gradients[rank])
distribution.average_gradients(accelerator, parameters)
found = {"gradients": [None if part.grad is None else part.grad.tolist() for part in parameters]}
distribution.copy_from_first(accelerator, parameters)
found["parameters"] = [parameter.tolist() for parameter in parameters]
for kind in ("whole", "sharded"):
    os.environ["ACCELERATE_USE_FSDP"] = str(kind == "sharded")
    done = []

    def work(job, advance):
        done.append(job)
        return torch.full((2,), float(job))

    results = distribution.share([1, 2, 3], work, kind)
    found[kind] = done, [result.tolist() for result in results]
torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
distribution.leave()
