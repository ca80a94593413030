"""What benchmarks/quality.py measures: every row of its table, as plain settings."""

from typing import NamedTuple


BASE_STEPS = 50


class Row(NamedTuple):
    name: str
    kind: str  # the series in the plot
    settings: dict


# Best of them on validation captions; the first is the script's default, in case of a tie.
RATES = [3e-4, 1e-4, 3e-5, 1e-5]
TRAJECTORY = ["--loss=trajectory", "--grid=auto", "--num_trajectories=16", "--timesteps_per_step=5"]
CAPTIONS = ["--prompts_file=CAPTIONS"]  # 63 further ones that are not held out
FITTED = ["--solver=fitted"]
TRAINED = {
    "flow": ({"train": []}, {"train": ["--grid=even"]}, {"train": ["--grid=auto"]}),
    "trajectory": (
        {"train": TRAJECTORY},
        {"train": TRAJECTORY + CAPTIONS},
        {"train": TRAJECTORY + ["--segment_weights"]},
    ),
    "fitted": (
        {"train": TRAJECTORY + FITTED},
        {"train": TRAJECTORY + FITTED + CAPTIONS},
        {"train": TRAJECTORY + FITTED, "scales": {"slow": 0.0, "fast": 0.0}},
    ),
    "fold": (
        {"train": TRAJECTORY + ["--guidance=fold"]},
        {"train": TRAJECTORY + CAPTIONS + ["--guidance=fold", "--max_train_steps=300"]},
    ),
    "ablation": tuple(
        {"train": train, "scales": {"slow": 1.0, "fast": 1.0} | {phase: 0.0}}
        for train in ([], TRAJECTORY, TRAJECTORY + CAPTIONS)
        for phase in ("fast", "slow")
    ),
    "knob": (
        {"train": TRAJECTORY + ["--rank=2"]},
        {"train": TRAJECTORY + ["--rank=32"]},
        {"train": TRAJECTORY, "phases": {"slow": ["--rank=2"], "fast": ["--rank=32"]}},
        {"train": TRAJECTORY, "phases": {"slow": ["--rank=32"], "fast": ["--rank=2"]}},
        {"train": TRAJECTORY + ["--timesteps_per_step=1"]},
        {"train": TRAJECTORY + ["--num_trajectories=1"]},
        {"train": TRAJECTORY + ["--lr_scheduler=cosine"]},
        {"train": TRAJECTORY + ["--lora_layers=to_q,to_k,to_v"]},
        {"train": TRAJECTORY + ["--lora_layers=norm.linear,norm1.linear,norm1_context.linear"]},
    ),
}
CACHES = [("FirstBlockCacheConfig", {"threshold": threshold}) for threshold in (0.05, 0.1, 0.2, 0.4)]
CACHES += [("TaylorSeerCacheConfig", {"cache_interval": interval}) for interval in (3, 5)]
CACHES += [
    ("TaylorSeerCacheConfig", {"cache_interval": interval, "max_order": 2, "use_lite_mode": True})
    for interval in (2, 3, 4, 5, 6)
]


def all_rows(args) -> list[Row]:
    """Every row, in the table's order."""
    rows = [Row("base, 200 steps", "base, even", {"steps": 4 * BASE_STEPS, "grid": "even"})]
    for guided, end in ((True, ""), (False, ", no guidance")):
        steps_and_grids = [(steps, grid) for steps in (20, 10, 8, 4) for grid in ("glance", "even", "auto")]
        for steps, grid in [(BASE_STEPS, "even"), *steps_and_grids]:
            label = f"{grid} grid, " if steps < BASE_STEPS else ""
            settings = {"steps": steps, "grid": grid} | ({} if guided else {"guided": False})
            rows.append(Row(f"base, {label}{steps} steps{end}", f"base, {grid}", settings))
    for scheduler, name in {"UniPCMultistepScheduler": "UniPC", "DPMSolverMultistepScheduler": "DPM++"}.items():
        for steps in (BASE_STEPS, 20, 10, 8, 4):
            rows.append(Row(f"{name}, {steps} steps", name, {"steps": steps, "scheduler": scheduler}))
    for config, options in CACHES:
        name = "first-block cache" if "First" in config else "TaylorSeer"
        name += " lite" if options.get("use_lite_mode") else ""
        label = ", ".join(f"{key.split('_')[-1]} {value}" for key, value in options.items() if value is not True)
        rows.append(Row(f"{name}, {label}", name, {"cache": [config, options]}))
    for name, folder in args.lora.items():
        rows.append(Row(name, "given LoRAs", {"lora": str(folder)}))
    if args.train_config:  # further captions are the demo's alone
        rows += [row for row in trained_rows() if not args.prompts_file or CAPTIONS[0] not in row.settings["train"]]
    return rows


def trained_rows() -> list[Row]:
    rows = [Row("flow, as published", "flow LoRA", {"train": [], "rates": RATES[:1]})]
    rows.append(Row("flow, as published, no guidance", "flow LoRA", rows[0].settings | {"guided": False}))
    for kind, many in TRAINED.items():
        for settings in many:
            words = settings["train"] + [f"{p} {' '.join(flags)}" for p, flags in settings.get("phases", {}).items()]
            words += [f"{phase} LoRA off" for phase, scale in settings.get("scales", {}).items() if scale == 0]
            name = " ".join(word.removeprefix("--") for word in words) or "default flags"
            rows.append(Row(f"{kind}: {name}", f"{kind} LoRA", {"rates": RATES} | settings))
    return rows
