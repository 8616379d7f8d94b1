# Everything is in e2e/harness (see e2e/README.md); this only names it.
HARNESS = python3 -m e2e.harness
AGENT ?= rkubelet
export AGENT

.PHONY: up down status logs shell agent e2e test soak conformance bench differential probe-load vm-up vm-down vm-shell vm-test

up:       ; @$(HARNESS) up
down:     ; @$(HARNESS) down
status:   ; @$(HARNESS) status
logs:     ; @$(HARNESS) logs $(NAMES)
shell:    ; @$(HARNESS) shell
agent:    ; @$(HARNESS) agent
e2e:      ; @$(HARNESS) test $(CASES)
bench:    ; @$(HARNESS) bench $(BENCH)

# `make probe-load RATE=1700 SECONDS=600 AGENTS=kubelet,rkubelet`
probe-load: ; @RATE='$(RATE)' SECONDS='$(SECONDS)' $(HARNESS) probe-load

# The same generated pods on both agents, compared. Heeds SEED, PODS, ONLY, AGENTS, AGAINST, FAULT: see e2e/README.md.
differential: ; @$(HARNESS) differential

# A VM as a second node of the running cluster: systemd, cgroup v2, AppArmor, reboot.
vm-up:    ; @$(HARNESS) vm-up
vm-down:  ; @$(HARNESS) vm-down
vm-shell: ; @$(HARNESS) vm-shell
vm-test:  ; @$(HARNESS) vm-test $(CASES)

LIST ?= part1
# The slow tests of a list wait for five minutes each and cost nothing: more processes than cores.
PROCS ?= 14
conformance:
	@$(HARNESS) conformance --list='$(LIST)' --focus='$(FOCUS)' --skip='$(SKIP)' --procs=$(PROCS)

# 500 pods through 24 virtual hours of faults, in one process. `cargo test` runs a short form. SEED=<n> for another day.
SEED ?= 1
soak:
	RKUBELET_SOAK=full RKUBELET_SOAK_SEED=$(SEED) cargo test --test in_memory soak::everything -- --nocapture

# What CI runs. `down` runs after failing cases too, and its own verdict counts.
test:
	@if [ -e Cargo.toml ]; then cargo test --workspace; else echo 'no Cargo.toml yet: cargo test is left out'; fi
	@python3 -m unittest -q e2e.differential.test_pure
	@$(HARNESS) up && $(HARNESS) test main_job lifecycle bad_pods node bad_input kill9; verdict=$$?; \
	if [ $$verdict != 0 ]; then $(HARNESS) logs $(AGENT) --lines=60; fi; \
	$(HARNESS) down && exit $$verdict
