"""Pack a run into files that can be committed, and unpack it to go on.

    python demo/next/checkpoints.py pack demo/next/checkpoint output/demo-next --run base
    python demo/next/checkpoints.py unpack demo/next/checkpoint output/demo-next --run base

weights.safetensors holds the float32 weights, average.safetensors their average and optimizer.safetensors the
optimizers' moments, both in bfloat16; state.json the step and the settings of the optimizers; vae/ goes along.
A run that is unpacked goes on with the same draws, and with moments rounded to bfloat16.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


logger = logging.getLogger(__name__)


def pack(folder: Path, work_dir: Path, run: str) -> None:
    state = torch.load(work_dir / f"{run}.pt", weights_only=True, map_location="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    # T5's two names for its embedding share memory, which safetensors refuses.
    weights = {name: value.clone() for name, value in state["trained"].items()}
    save_file(weights, folder / "weights.safetensors")
    average = {name: value.bfloat16().contiguous() for name, value in state["average"].items()}
    save_file(average, folder / "average.safetensors")
    moments = {"generator": state["generator"]}
    for i, optimizer in enumerate(state["optimizers"]):
        for index, values in optimizer["state"].items():
            for name, value in values.items():
                value = value.bfloat16() if value.numel() > 1 else value.float()
                moments[f"{i}.{index}.{name}"] = value.contiguous()
    save_file(moments, folder / "optimizer.safetensors")
    groups = [optimizer["param_groups"] for optimizer in state["optimizers"]]
    values = {"step": state["step"], "running": state["running"], "param_groups": groups}
    (folder / "state.json").write_text(json.dumps(values) + "\n")
    shutil.copytree(work_dir / "vae", folder / "vae", dirs_exist_ok=True)
    logger.info(f"step {state['step']} packed into {folder}")


def unpack(folder: Path, work_dir: Path, run: str) -> None:
    values = json.loads((folder / "state.json").read_text())
    moments = load_file(folder / "optimizer.safetensors")
    state = {"trained": load_file(folder / "weights.safetensors"), "generator": moments.pop("generator")}
    state |= {"average": {k: v.float() for k, v in load_file(folder / "average.safetensors").items()}}
    state |= {"step": values["step"], "running": values["running"]}
    state["optimizers"] = [{"state": {}, "param_groups": groups} for groups in values["param_groups"]]
    for key, value in moments.items():
        i, index, name = key.split(".")
        state["optimizers"][int(i)]["state"].setdefault(int(index), {})[name] = value.float()
    work_dir.mkdir(parents=True, exist_ok=True)
    # The text encoders' first training is over: their weights are in the run.
    parts = {part: select(state["trained"], part) for part in ("clip", "t5")}
    torch.save(parts, work_dir / "text.pt")
    torch.save(state, work_dir / f"{run}.pt")
    shutil.copytree(folder / "vae", work_dir / "vae", dirs_exist_ok=True)
    logger.info(f"step {state['step']} unpacked into {work_dir}")


def select(weights: dict, part: str) -> dict:
    """The weights of one part, without its name in front."""
    return {name[len(part) + 1 :]: value for name, value in weights.items() if name.startswith(part + ".")}


def main():
    parser = argparse.ArgumentParser(description="Pack a run into files that can be committed, or unpack it.")
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--run", default="base")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (pack if args.action == "pack" else unpack)(args.folder, args.work_dir, args.run)


if __name__ == "__main__":
    main()
