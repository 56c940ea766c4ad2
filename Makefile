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

$(VENV)/.test: requirements/test.txt requirements/controller.txt | $(VENV)/.controller
	@echo "Adding the test tools to $(VENV) ..."
	@$(VENV)/bin/python -m pip install --quiet --requirement $<
	@touch $@

.PHONY: controller test-tools
controller: $(VENV)/.controller $(LINK)
test-tools: $(VENV)/.test $(LINK)
