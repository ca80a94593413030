# make demo   train both LoRAs on the demo model and draw the comparison: output/demo/comparison.png
# make test   lint and the test suite
# make long   what is left out there, as it repeats what is in: every family and class trained, every kind of processes
# make soak   kill -9 and resume training runs 50 times at random moments: how many survived, how many came out equal
# make gpu    on a machine with a CUDA GPU: the tests marked gpu, then all benchmarks: docs/measured/CARD.md
# Each creates .venv and installs into it first; nothing else is needed but Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# glibc otherwise hands every large buffer back to the system and faults it in again: up to ten times slower on a CPU.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_TOP_PAD_ := 268435456

.PHONY: demo test long soak gpu clean

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/development: requirements-dev.txt .venv/runtime
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# What the page needs, above the rest: Gradio takes no Pillow as new as the suite's. Chromium where it can be had.
.venv/page/ready: requirements-page.txt .venv/development
	$(PYTHON) -m venv .venv/page
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> $$(.venv/page/bin/python -c "import site; print(site.getsitepackages()[0])")/venv.pth
	.venv/page/bin/python -m pip install --quiet -r requirements-page.txt playwright==1.65.2
	command -v chromium > /dev/null || { apt-get -qq update && apt-get -qq install chromium; } > /dev/null 2>&1 || true
	touch $@

demo: .venv/runtime
	ACCELERATE_USE_CPU=1 $(BIN)/python train_glance_lora.py --config configs/demo.yaml --export comfyui
	$(BIN)/python infer_glance.py --pretrained_model_name_or_path demo/model --lora output/demo \
		--prompts_file demo/prompts.txt --compare --output output/demo/comparison.png

test: .venv/development .venv/page/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests
	OMP_NUM_THREADS=1 .venv/page/bin/python -m pytest -q -m page tests/test_page.py

long: .venv/development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m long tests

soak: .venv/development
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --rounds 50

gpu: .venv/development
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv output
