"""The same generated pods on both agents in turn, compared: see e2e/README.md, "The differential run"."""
