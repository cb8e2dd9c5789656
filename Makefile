PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed

.PHONY: install quickstart test lint clean-venv

install: $(STAMP)

quickstart: $(STAMP)
	$(VENV)/bin/deme run digits

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The constraints keep pip from taking a CUDA build of torch, or a torchvision that does not match it.
$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -q -c constraints-cpu.txt -e ".[dev]"
	touch $(STAMP)

clean-venv:
	rm -rf $(VENV)
