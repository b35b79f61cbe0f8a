# What people, the pre-commit hook and CI run. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 3000
QUICKSTART ?= checkpoints/quickstart
# Not shipped (no licence to redistribute): a directory with SST-2 as JSON lines.
SST2_DATA ?= data/sst2
SST2 ?= checkpoints/sst2-joint
# The directories of sst2, trec6, mrpc and clinc150, and how many runs at a time.
OBJECTIVES_DATA ?= data
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := model kernels training service loadtest

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z0-9-]+):.*## .*/\1/p' $(MAKEFILE_LIST))

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(INSTALLED) ## a virtual environment with everything this machine can use
$(INSTALLED): pyproject.toml scripts/install.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh scripts/install.sh
	@touch $@

quickstart: $(QUICKSTART)/offramp.json ## train and calibrate the quickstart checkpoint (SNIPS), if there is none
$(QUICKSTART)/offramp.json: | $(INSTALLED)
	$(BIN)/offramp-train fit training/recipes/snips-joint.toml --data training/data/snips --output $(QUICKSTART)

serve: $(INSTALLED) $(QUICKSTART)/offramp.json ## answer HTTP requests on port 3000 with the quickstart checkpoint
	$(BIN)/offramp-serve --model-id $(QUICKSTART) --served-model-name snips --port $(PORT)

test: $(INSTALLED) ## the whole test suite on CPU, slow tests left out
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist worksteal

test-slow: $(INSTALLED) ## the tests that take minutes: the quickstart as a newcomer types it (containers: make e2e)
	$(BIN)/python -m pytest -m "slow and not docker"

test-gpu: $(INSTALLED) ## kernels and engine on a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu

install-e2e: ## what `make e2e` and the slow tests need beside the environment (Debian, root)
	sh scripts/install-e2e.sh

# E2E_JSON=docs/results/containers.json keeps the figures.
e2e: $(INSTALLED) install-e2e ## build the images, run the compose stack, and break it in several ways
	$(BIN)/python -m pytest -s -n 0 tests/e2e/test_containers.py

test-kserve: $(INSTALLED) $(QUICKSTART)/offramp.json ## KServe's own client, in an environment of its own, against the quickstart server
	test -x $(VENV)-kserve/bin/python || $(PYTHON) -m venv $(VENV)-kserve
	$(VENV)-kserve/bin/python -m pip --quiet --disable-pip-version-check install kserve==0.21.0
	$(BIN)/python tests/clients/kserve_client.py --server $(QUICKSTART) --client $(VENV)-kserve/bin/python

test-locust: $(INSTALLED) $(QUICKSTART)/offramp.json ## the locust file, in an environment of its own, against the quickstart server
	test -x $(VENV)-locust/bin/python || $(PYTHON) -m venv $(VENV)-locust
	$(VENV)-locust/bin/python -m pip --quiet --disable-pip-version-check install locust==2.47.0
	$(BIN)/python tests/clients/locust_run.py $(QUICKSTART) --locust $(VENV)-locust/bin/locust

test-ray: $(INSTALLED) $(QUICKSTART)/offramp.json ## Ray Serve on two simulated nodes, in an environment of its own (1.1 GB), on loopback only
	test -x $(VENV)-ray/bin/ray || EXTRAS=serve,torch,onnx,ray PYTHON=$(PYTHON) VENV=$(VENV)-ray sh scripts/install.sh
	test -e $(QUICKSTART)-onnx/offramp.json || $(BIN)/offramp-train export $(QUICKSTART) --format onnx --output $(QUICKSTART)-onnx
	rm -rf $(VENV)-ray/work && mkdir $(VENV)-ray/work
	unshare --map-root-user --net sh -c 'ip link set lo up && exec $(VENV)-ray/bin/python \
	  tests/clients/ray_cluster.py $(QUICKSTART) $(QUICKSTART)-onnx --work $(VENV)-ray/work --json docs/results/ray.json'

check: lint types imports spelling test ## everything that must hold before a change goes in

lint: $(INSTALLED) ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy, strict
	$(BIN)/mypy

imports: $(INSTALLED) ## the dependency rule
	$(BIN)/lint-imports

spelling: $(INSTALLED) ## codespell
	$(BIN)/codespell $(PACKAGES) deploy tests scripts docs *.md

format: $(INSTALLED) ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results-quickstart: $(INSTALLED) $(QUICKSTART)/offramp.json ## evaluate the quickstart checkpoint on SNIPS test rows
	$(BIN)/offramp-train evaluate $(QUICKSTART) --data training/data/snips --split test \
	  --json docs/results/quickstart.json --plot docs/results/quickstart.png

results-sst2: $(INSTALLED) ## train joint on SST-2 and write docs/results/sst2-joint.*
	test -e $(SST2)/offramp.json || \
	  $(BIN)/offramp-train fit training/recipes/sst2-joint.toml --data $(SST2_DATA) --output $(SST2)
	$(BIN)/offramp-train evaluate $(SST2) --data $(SST2_DATA) --split validation \
	  --json docs/results/sst2-joint.json --plot docs/results/sst2-joint.png

results-objectives: $(INSTALLED) ## the comparison of the training objectives; does what is not done yet (hours)
	$(BIN)/python training/bench/compare_objectives.py --data $(OBJECTIVES_DATA) --workers $(WORKERS)
	$(BIN)/python training/bench/objectives_report.py

bench-engine: $(INSTALLED) ## rows per second: engine at several speed-ups against transformers
	$(BIN)/python model/bench/bench_engine.py $(SST2) --data $(SST2_DATA) --json docs/results/engine.json
	$(BIN)/python model/bench/bench_layouts.py $(SST2) --data $(SST2_DATA) --json docs/results/layouts.json

bench-cpu: $(INSTALLED) ## rows per second: ONNX Runtime segments, exits off and on, against a whole-model int8 graph
	test -e $(SST2)-onnx/offramp.json || $(BIN)/offramp-train export $(SST2) --format onnx --output $(SST2)-onnx
	test -e $(SST2)-int8/offramp.json || \
	  $(BIN)/offramp-train export $(SST2) --format onnx --quantize int8 --data $(SST2_DATA) --output $(SST2)-int8
	$(BIN)/python model/bench/bench_cpu.py $(SST2) --onnx $(SST2)-onnx --int8 $(SST2)-int8 \
	  --data $(SST2_DATA) --json docs/results/cpu.json

bench-kernels: $(INSTALLED) ## compaction kernels: time and bytes
	$(BIN)/python kernels/bench/bench_kernels.py --out docs/results/kernels.json

bench-gpu: $(INSTALLED) ## on a CUDA device: kernels, a layer by live tokens, the lane against transformers
	$(BIN)/python kernels/bench/bench_kernels.py --out docs/results/kernels-gpu.json
	$(BIN)/python model/bench/bench_gpu.py --json docs/results/gpu.json

bench-scheduler: $(INSTALLED) ## simulated: throughput and p99 by load, for each way to schedule
	$(BIN)/python service/bench/bench_scheduler.py $(wildcard $(SST2) $(SST2)-int8) --data $(SST2_DATA) \
	  --json docs/results/scheduler.json

bench-slo: $(INSTALLED) ## simulated: a step of load with the SLO controller and without, on the costs of bench-scheduler
	$(BIN)/python service/bench/bench_slo.py $(SST2)-int8 --data $(SST2_DATA) --costs docs/results/scheduler.json \
	  --json docs/results/slo.json

bench-plan: $(INSTALLED) ## simulated: replicas that a load needs, by the planner and by the scheduler itself
	$(BIN)/python service/bench/bench_plan.py $(wildcard $(SST2)-int8 $(SST2)) --data $(SST2_DATA) \
	  --costs docs/results/scheduler.json --json docs/results/plan.json

bench-slo-served: $(INSTALLED) ## a step of load on a real server, with the SLO controller and without
	test -e $(SST2)-int8/offramp.json || \
	  $(BIN)/offramp-train export $(SST2) --format onnx --quantize int8 --data $(SST2_DATA) --output $(SST2)-int8
	$(BIN)/python service/bench/bench_slo_served.py $(SST2)-int8 --data $(SST2_DATA) --json docs/results/slo-served.json

bench-serve: $(INSTALLED) ## the service against its parts: rows per second, latency under load, what HTTP costs
	test -e $(SST2)-int8/offramp.json || \
	  $(BIN)/offramp-train export $(SST2) --format onnx --quantize int8 --data $(SST2_DATA) --output $(SST2)-int8
	$(BIN)/python service/bench/bench_serve.py $(SST2)-int8 --data $(SST2_DATA) --json docs/results/serve.json

bench-workers: $(INSTALLED) ## batches side by side against one at a time, in int8 and in torch
	test -e $(SST2)-int8/offramp.json || \
	  $(BIN)/offramp-train export $(SST2) --format onnx --quantize int8 --data $(SST2_DATA) --output $(SST2)-int8
	$(BIN)/python service/bench/bench_workers.py $(SST2)-int8 $(SST2) --data $(SST2_DATA) --json docs/results/workers.json

bench-load: $(INSTALLED) ## how much load one process of the generator offers and is still on time
	$(BIN)/python loadtest/bench/bench_generator.py --json docs/results/loadtest.json

bench-peers: $(INSTALLED) ## infinity, PyTriton, mosec and a naive server against this one: same weights, cores, load (half an hour)
	test -e $(SST2)-int8/offramp.json || \
	  $(BIN)/offramp-train export $(SST2) --format onnx --quantize int8 --data $(SST2_DATA) --output $(SST2)-int8
	PYTHON=$(PYTHON) $(BIN)/python loadtest/peers/bench_peers.py $(SST2) --int8 $(SST2)-int8 --data $(SST2_DATA) \
	  --json docs/results/peers.json

soak: $(INSTALLED) $(QUICKSTART)/offramp.json ## five minutes of everything at once against the quickstart server
	$(BIN)/python service/bench/soak.py $(QUICKSTART) --texts training/data/snips/test.jsonl.gz --json docs/results/soak.json

screenshots: $(INSTALLED) ## the pictures of /ui in docs/images; needs Chromium (apt-get install chromium)
	test -e $(SST2)-int8/offramp.json || \
	  $(BIN)/offramp-train export $(SST2) --format onnx --quantize int8 --data $(SST2_DATA) --output $(SST2)-int8
	$(BIN)/python scripts/screenshots.py $(SST2)-int8 --name sst2 --texts $(SST2_DATA)/validation.jsonl.gz \
	  --output docs/images

dashboards: $(INSTALLED) ## write the Grafana dashboards anew
	cd deploy/grafana && $(abspath $(BIN))/python -m offramp_dashboards

chart: $(INSTALLED) ## the made parts of the Helm chart: schema of settings, table of values, copies of rules and dashboards
	$(BIN)/python scripts/chart.py sync

chart-package: $(INSTALLED) ## dist/offramp-VERSION.tgz, to be pushed to a registry of charts
	$(BIN)/python scripts/chart.py package

manifests: $(INSTALLED) ## deploy/kubernetes, as the Helm chart renders it
	$(BIN)/python scripts/chart.py manifests

reference: $(INSTALLED) ## write docs/reference/ from the code
	$(BIN)/python scripts/reference.py

docs: $(INSTALLED) ## the Python packages' documentation as HTML, in build/api
	$(BIN)/pdoc --output-directory build/api offramp_model offramp_kernels offramp_training offramp_service offramp_loadtest

clean: ## remove what can be made again (not the checkpoints)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
