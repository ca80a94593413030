"""What does benchmarks/quality.py measure? Every row of its table, as plain settings.

A row may be added anywhere; settings that change mean another row, which is measured anew.
"""

from typing import NamedTuple


BASE_STEPS = 50


class Row(NamedTuple):
    """One row of the table."""

    name: str
    kind: str  # the series in the plot
    settings: dict


# Best of them on validation captions; the first in case of a tie.
RATES = [3e-4, 1e-4, 3e-5, 1e-5]
TRAJECTORY = ["--loss=trajectory", "--grid=auto", "--solver=euler", "--timesteps_per_step=5", "--num_trajectories=16"]
# With further captions that are not held out; so many with the training one.
CAPTIONS = (16, 32, 64)
CAPTIONS_16 = [*TRAJECTORY, "--num_trajectories=4", "--prompts_file=CAPTIONS-15.txt"]
CAPTIONS_64 = [*TRAJECTORY, "--num_trajectories=1", "--prompts_file=CAPTIONS-63.txt"]
CAPTIONS_32 = ["--prompts_file=CAPTIONS-31.txt"]
FITTED = ["--solver=fitted"]
# One dial: the calls of a picture, the most important first, and the captions on which the sampler is found.
CALLS = (10, 4, 20, 6, 14, 8)
FOUND_ON = {"32 captions": CAPTIONS_32, "16 captions": ["--prompts_file=CAPTIONS-15.txt"], "one caption": []}
FEWEST = {"one caption": 8}  # with fewer calls one caption is refused
ENDPOINT = ["--loss=endpoint", *CAPTIONS_32, "--max_train_steps=120", "--gradient_accumulation_steps=4"]
ENDPOINT += ["--train_batch_size=1", "--lr_scheduler=cosine", "--lr_warmup_steps=10", "--max_grad_norm=0.1"]
ENDPOINT += ["--adam_beta2=0.99"]
FOLD = ["--guidance=fold", "--rank=32", "--lr_scheduler=cosine", "--segment_weights=length"]
OFF = {"slow": {"scales": {"slow": 0.0, "fast": 1.0}}, "fast": {"scales": {"slow": 1.0, "fast": 0.0}}}
TRAINED = {
    "flow": {
        "glance grid": {"train": []},
        "even grid": {"train": ["--grid=even"]},
        "auto grid": {"train": ["--grid=auto"]},
        "auto grid, fitted solver": {"train": ["--grid=auto", *FITTED]},
    },
    "trajectory": {
        "one caption": {"train": TRAJECTORY},
        "64 captions": {"train": CAPTIONS_64},
        "and flow, weight 0.1": {"train": [*TRAJECTORY, "--flow_weight=0.1"]},
        "and flow, weight 1": {"train": [*TRAJECTORY, "--flow_weight=1"]},
    },
    "fitted solver": {
        "one caption": {"train": TRAJECTORY + FITTED},
        "64 captions": {"train": CAPTIONS_64 + FITTED},
    },
    "folded guidance": {
        "one caption": {"train": TRAJECTORY + FOLD, "rates": [1e-3, 3e-4, 1e-4]},
        "16 captions, 300 steps": {
            "train": [*CAPTIONS_16, *FOLD, "--max_train_steps=300"],
            "rates": [1e-3, 3e-4],  # 1e-4 and less were further off, weighed uniformly
        },
    },
    "ablation": {
        f"{name}, only {'slow' if off == 'fast' else 'fast'}": {"train": train} | OFF[off]
        for name, train in {"flow": [], "trajectory": TRAJECTORY, "64 captions": CAPTIONS_64}.items()
        for off in ("fast", "slow")
    },
    "knob": {
        "flow, five timesteps per update": {"train": ["--timesteps_per_step=5"]},
        "rank 2": {"train": [*TRAJECTORY, "--rank=2"]},
        "rank 32": {"train": [*TRAJECTORY, "--rank=32"]},
        "rank 2 slow, 32 fast": {"train": TRAJECTORY, "phases": {"slow": ["--rank=2"], "fast": ["--rank=32"]}},
        "rank 32 slow, 2 fast": {"train": TRAJECTORY, "phases": {"slow": ["--rank=32"], "fast": ["--rank=2"]}},
        "one timestep per update": {"train": [*TRAJECTORY, "--timesteps_per_step=1"]},
        "one trajectory": {"train": [*TRAJECTORY, "--num_trajectories=1"]},
        "errors weighed by step length": {"train": [*TRAJECTORY, "--segment_weights=length"]},
        "cosine rate": {"train": [*TRAJECTORY, "--lr_scheduler=cosine"]},
        "only q, k, v": {"train": [*TRAJECTORY, "--lora_layers=to_q,to_k,to_v"]},
        "only modulation": {"train": [*TRAJECTORY, "--lora_layers=norm.linear,norm1.linear,norm1_context.linear"]},
    },
}
CACHES = [("FirstBlockCacheConfig", {"threshold": threshold}) for threshold in (0.05, 0.1, 0.2, 0.4)]
CACHES += [("TaylorSeerCacheConfig", {"cache_interval": interval}) for interval in (3, 5)]
CACHES += [
    ("TaylorSeerCacheConfig", {"cache_interval": interval, "max_order": 2, "use_lite_mode": True})
    for interval in (2, 3, 4, 5, 6)
]
# Of cache-dit: the relative change of the first block's residual below which the other blocks are left out.
DBCACHES = [
    {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4, "residual_diff_threshold": threshold}
    for threshold in (0.05, 0.1, 0.2, 0.4)
]
STEPS = (20, 10, 8, 7, 5, 4, 3, 2)  # of guided steps that cost from 40 to 4 calls
# The series of the plot, by kind: the name that stands at its line, at which end, and its colour, grey for what is not
# this project's. The first seven that are measured are drawn.
PLOTTED = {
    "given LoRAs": ("given LoRAs", "left", "tab:purple"),
    "endpoint LoRAs": ("endpoint LoRAs", "left", "tab:red"),
    "mixed branches, 32 captions": ("mixed branches", "left", "tab:orange"),
    "base, auto, fitted": ("fitted solver", "right", "tab:green"),
    "base, auto": ("auto grid", "right", "tab:blue"),
    "base, shipped": ("base as shipped", "left", "0.35"),
    "TaylorSeer lite": ("TaylorSeer lite, the best cache", "right", "0.5"),
    "UniPC, auto grid": ("UniPC, auto grid", "left", "0.6"),
}


def all_rows(args) -> list[Row]:
    """Return every row, in the table's order."""
    rows = [Row("base, 200 steps", "base, even", {"steps": 4 * BASE_STEPS, "grid": "even"})]
    for guided, end in ((True, ""), (False, ", no guidance")):
        steps_and_grids = [(steps, grid) for steps in (20, 10, 8, 4) for grid in ("glance", "even", "auto")]
        for steps, grid in [(BASE_STEPS, "even"), *steps_and_grids]:
            label = f"{grid} grid, " if steps < BASE_STEPS else ""
            settings = {"steps": steps, "grid": grid} | ({} if guided else {"guided": False})
            rows.append(Row(f"base, {label}{steps} steps{end}", f"base, {grid}", settings))
    for steps in (20, 10, 8, 4):
        for grid in ("even", "auto"):
            settings = {"steps": steps, "grid": grid, "solver": "fitted"}
            rows.append(Row(f"base, {grid} grid, fitted solver, {steps} steps", f"base, {grid}, fitted", settings))
    for steps in STEPS:  # "shipped" is the pipeline's own schedule of so many steps, "rotation" has equal angles
        grids = ("shipped", "rotation") if steps in (20, 10, 8, 4) else ("shipped", "auto", "rotation")
        for grid in grids:
            rows.append(Row(f"base, {grid} grid, {steps} steps", f"base, {grid}", {"steps": steps, "grid": grid}))
        if "auto" in grids:
            settings = {"steps": steps, "grid": "auto", "solver": "fitted"}
            rows.append(Row(f"base, auto grid, fitted solver, {steps} steps", "base, auto, fitted", settings))
    for scheduler, name in {"UniPCMultistepScheduler": "UniPC", "DPMSolverMultistepScheduler": "DPM++"}.items():
        for steps in (BASE_STEPS, 20, 10, 8, 4):
            rows.append(Row(f"{name}, {steps} steps", name, {"steps": steps, "scheduler": scheduler}))
        for steps in STEPS:
            settings = {"steps": steps, "scheduler": scheduler, "grid": "auto"}
            rows.append(Row(f"{name}, auto grid, {steps} steps", f"{name}, auto grid", settings))
    for config, options in CACHES:
        name = "first-block cache" if "First" in config else "TaylorSeer"
        name += " lite" if options.get("use_lite_mode") else ""
        label = ", ".join(f"{key.split('_')[-1]} {value}" for key, value in options.items() if value is not True)
        rows.append(Row(f"{name}, {label}", name, {"cache": [config, options]}))
    for options in DBCACHES:
        name = f"DBCache, threshold {options['residual_diff_threshold']}"
        rows.append(Row(name, "DBCache", {"cache_dit": options | {"enable_separate_cfg": True}}))
    for name, folder in args.lora.items():
        rows.append(Row(name, "given LoRAs", {"lora": str(folder)}))
    if args.train_config:  # further captions are the demo's alone
        rows += [row for row in made_rows() if not args.prompts_file or "CAPTIONS" not in str(row.settings)]
    return rows


def made_rows() -> list[Row]:
    """Return the rows of what train_glance_lora.py makes for them."""
    return dialled_rows() + trained_rows()


def dialled_rows() -> list[Row]:
    """Return the rows of --num_model_calls: the sampler alone, on which nothing is trained, and with LoRAs."""
    rows = []
    for name, captions in FOUND_ON.items():
        for calls in CALLS:
            if calls >= FEWEST.get(name, 0):
                flags = [f"--num_model_calls={calls}", "--max_train_steps=0", *captions]
                settings = {"train": flags, "rates": [None]}
                rows.append(Row(f"mixed branches, {calls} calls, {name}", f"mixed branches, {name}", settings))
    for calls in CALLS:
        dial = [f"--num_model_calls={calls}"]
        settings = {"train": dial + ENDPOINT, "sampler": [*dial, "--max_train_steps=0", *CAPTIONS_32]}
        settings |= {"rates": [1e-3, 3e-4]}
        rows.append(Row(f"endpoint LoRAs, {calls} calls", "endpoint LoRAs", settings))
    return rows


def trained_rows() -> list[Row]:
    """Return the rows of pairs that are trained for them."""
    rows = [Row("flow, as published", "flow LoRA", {"train": [], "rates": RATES[:1]})]
    rows.append(Row("flow, as published, no guidance", "flow LoRA", rows[0].settings | {"guided": False}))
    for kind, many in TRAINED.items():
        for name, settings in many.items():
            rows.append(Row(f"{kind}: {name}", f"{kind} LoRA", {"rates": RATES} | settings))
    return rows
