# Every target makes the virtual environment it needs: a machine with Python >= 3.11, pip and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UNIT := tests/adapters/test_cores.py tests/adapters/test_adapters.py tests/preprocess/test_corpus.py \
	tests/preprocess/test_plan.py tests/preprocess/test_products.py tests/preprocess/test_solvers.py \
	tests/preprocess/test_whitening.py tests/store/test_store_format.py tests/system/test_structure.py
CONSTRAINTS ?= constraints.txt
READY := $(VENV)/ready

.PHONY: demo test test-unit test-all lint format clean

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[test]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

# many small models: two processes of one thread each do not wait for each other
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not stress"

# what needs no process of its own, no server and no pipeline run
test-unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not stress" $(UNIT)

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the checker needs the package under its name, whatever the clone is called
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types && ln -sfn ../.. build/types/prep
	MYPYPATH=build/types $(BIN)/mypy -m prep -m prep.cli -p prep.store -p prep.preprocess -p prep.adapters -p prep.reporting

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
