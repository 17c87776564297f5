# Each target does its own set-up on a fresh machine: Python 3.11 or newer, pip and make are enough.
PYTHON ?= python3
BIN := .venv/bin
DEMO := out/demo

.PHONY: demo toys test attack bench numbers map real clean

demo: .venv/ready $(DEMO)/world/world.json  ## small world -> SPPO with a learned judge -> exact evaluation, figure
	$(BIN)/python train.py --preset tiny --policy $(DEMO)/world/policy --judge $(DEMO)/world/judge \
		--prompts $(DEMO)/world/prompts.jsonl --out $(DEMO)/run
	$(BIN)/python -m toy.text_game measure $(DEMO)/world $(DEMO)/run
	@cp $(DEMO)/run/measure.png figures/demo.png && echo "figure: figures/demo.png"

$(DEMO)/world/world.json: | .venv/ready
	$(BIN)/python -m toy.text_game build $(DEMO)/world

toys: .venv/ready  ## every figure of the laboratory, and its numbers, under out/toy/
	@for toy in rps tabular likelihood ablations judges relatives social_choice; do echo && echo "toy.$$toy" && $(BIN)/python -m toy.$$toy || exit; done

test: .venv/ready-dev  ## lint and format, then every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n auto --dist worksteal

bench: .venv/ready-dev  ## ours beside transformers and TRL: 23 minutes on two cores that do nothing else
	$(BIN)/python benchmarks/side_by_side.py

attack: .venv/ready-dev  ## about 1,950 broken inputs, kills, full disks, pairs of processes; a table
	$(BIN)/python -m tests.attack --seed 0 --out out/attack.json

numbers: .venv/ready-dev  ## every published number again, hours; docs/numbers.md
	$(BIN)/python tests/refresh_numbers.py

map:  ## put the line numbers of the code that the pages quote right
	$(PYTHON) tests/refresh_map.py

real: .venv/ready-real  ## a real chat model, and preferences that a program can check
	$(BIN)/python -m real.smollm2 --out out/smollm2
	$(BIN)/python -m real.instructions

clean:
	rm -rf out .venv

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/ready-real: requirements-real.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-real.txt
	@touch $@
