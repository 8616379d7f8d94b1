"""The harness: builds a real cluster on this machine, runs tests on it, and takes it down again. See ../README.md."""
