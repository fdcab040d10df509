# Every target sets up what it needs; `make demo` and `make test` work right after a clone.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
# The CPU build of torch serves demo, tests and checks; the image installs its own CUDA build.
# This index is asked for torch alone, and once: where it cannot be reached nothing waits for it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo demo-text page browser same test test-quick check docs format attack evaluate bench-lora bench-cache bench-start bench-jobs bench-tools bench-page bench-text bench-live evaluate-text clean

demo: $(VENV)/ready
	$(RUN) -m demo

# The same for text: a sheet of answers in the terminal.
demo-text: $(VENV)/ready
	$(RUN) -m demo.text

# The web page on the demo model, in your browser; its LoRAs are copied to out/page, where they may be deleted.
page: $(VENV)/ready
	[ -d out/page/loras ] || { mkdir -p out/page && cp -r demo/loras out/page/loras; }
	WORKER_MODEL=demo WORKER_TINY_VAE=demo LORA_CACHE_DIR=out/page/loras $(RUN) -m page --local --open

# Chromium for the page's tests. Where it cannot be installed they are skipped, and say so.
browser:
	@command -v chromium > /dev/null \
	    || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 \
	    || echo "no Chromium is here, and it cannot be installed: the tests of the page in a browser are skipped"

test: $(VENV)/ready-dev browser
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What matters while editing, in under three minutes on two cores: no emulator, no commands, no killed processes.
test-quick: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow" -k "not kill and not sigterm" \
	    tests/lora tests/worker tests/test_schemas.py tests/test_settings.py tests/test_architecture.py --ignore tests/lora/commands

check: $(VENV)/ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest tests/test_architecture.py

# README's tables and .runpod/hub.json, from the settings, schemas and errors.
docs: $(VENV)/ready-dev
	$(RUN) -m docs.generate

format: $(VENV)/ready-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Attackers of each promise, at random, for about 25 minutes; benchmarks/results/attack.json keeps what they did.
# Again as it was: make attack SEED=...
attack: $(VENV)/ready-dev
	ATTACK_SECONDS=100 ATTACK_SEED=$${SEED:-$$(date +%s)} OMP_NUM_THREADS=1 \
	    $(RUN) -m pytest tests/promises/attackers

evaluate: $(VENV)/ready
	$(RUN) -m benchmarks.demo_model

# Do two commits give the same pictures and files? make same BEFORE=COMMIT
same: $(VENV)/ready
	$(RUN) -m benchmarks.commits $(BEFORE)

# make bench-lora BEFORE=COMMIT: that commit's engine, too, in turns with this one's
bench-lora: $(VENV)/ready-dev
	$(if $(BEFORE),$(RUN) -m benchmarks.lora_commits $(BEFORE))
	$(RUN) -m benchmarks.lora_engine
	$(RUN) -m benchmarks.lora_steps

bench-cache: $(VENV)/ready
	$(RUN) -m benchmarks.cache

# make bench-start BEFORE=COMMIT MODEL=build/sdxl-random
bench-start: $(VENV)/ready-dev
	$(RUN) -m benchmarks.start $(BEFORE) $(if $(MODEL),--model $(MODEL))

# make bench-jobs BEFORE=COMMIT
bench-jobs: $(VENV)/ready-dev
	$(RUN) -m benchmarks.jobs $(BEFORE)

bench-tools: $(VENV)/ready
	$(RUN) -m benchmarks.tools

bench-page: $(VENV)/ready-dev browser
	$(RUN) -m benchmarks.browser

bench-text: $(VENV)/ready-dev
	$(RUN) -m benchmarks.text

# Live frames; with FULL=--full also SDXL's UNet, which takes 5 GB of memory.
bench-live: $(VENV)/ready-dev
	$(RUN) -m benchmarks.live $(FULL)

evaluate-text: $(VENV)/ready
	$(RUN) -m benchmarks.demo_text_model

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --retries 0 --timeout 20 --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.txt) 2>/dev/null \
	    || echo "$(TORCH_INDEX) cannot be reached: torch comes from the usual index"
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) out build .pytest_cache .ruff_cache .mypy_cache .hypothesis
