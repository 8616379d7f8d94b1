"""The verbs of the harness: python3 -m e2e.harness VERB. The Makefile calls nothing else."""

import argparse
import os
import sys

from e2e.harness import layout
from e2e.harness.steps import CommandFailed, HarnessError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m e2e.harness")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="build what is missing, start what does not run, show the result")
    verbs.add_parser("down", help="take everything away and prove it")
    verbs.add_parser("status")
    logs = verbs.add_parser("logs", help="the end of every log, or of those named")
    logs.add_argument("names", nargs="*")
    logs.add_argument("--lines", type=int, default=30)
    verbs.add_parser("agent", help="put AGENT in the place of the agent that runs")
    verbs.add_parser("shell", help="a shell with KUBECONFIG and kubectl")
    test = verbs.add_parser("test", help="run the e2e cases on the running cluster")
    test.add_argument("names", nargs="*", metavar="topic[:test_name]")
    conformance = verbs.add_parser("conformance", help="run tests of Kubernetes' own e2e suite")
    conformance.add_argument("--list", default="part1", help="a file in e2e/conformance (default: part1)")
    conformance.add_argument("--focus", default="", help="a regular expression instead of a list")
    conformance.add_argument("--skip", default="")
    conformance.add_argument("--procs", type=int, default=14)
    verbs.add_parser("vm-up", help="boot a VM as a second node of the running cluster, or put AGENT into the one that runs")
    verbs.add_parser("vm-down", help="take the VM node away and prove it")
    verbs.add_parser("vm-shell", help="a shell in the VM")
    vm_test = verbs.add_parser("vm-test", help="run the cases of the VM node")
    vm_test.add_argument("names", nargs="*", metavar="topic[:test_name]")
    bench = verbs.add_parser("bench", help="measure the bare runtime and the agents of AGENTS, one table")
    bench.add_argument("names", nargs="*")
    verbs.add_parser("probe-load", help="RATE probes a second for SECONDS on the agents of AGENTS: lateness, memory, sockets")
    differential = verbs.add_parser("differential", help="run generated pods on the agents of AGENTS and compare them")
    differential.add_argument("--dry-run", action="store_true", help="only show the pods")
    arguments = parser.parse_args()
    try:
        return 0 if _do(arguments) is not False else 1
    except (HarnessError, CommandFailed, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _do(arguments: argparse.Namespace) -> bool | None:
    # Imported here: `down` and `status` must work even if something else is broken.
    from e2e.harness import up

    match arguments.verb:
        case "up":
            return up.up()
        case "down":
            return up.down()
        case "status":
            return up.status()
        case "agent":
            return up.swap_agent()
        case "logs":
            return _logs(arguments.names, arguments.lines)
        case "shell":
            return _shell()
        case "test":
            from e2e.harness import cases

            return cases.run_cases(arguments.names)
        case "conformance":
            from e2e.harness import conformance

            return conformance.run_conformance(arguments.list, arguments.focus, arguments.skip, arguments.procs)
        case "vm-up" | "vm-down" | "vm-shell":
            from e2e.harness import vm

            return {"vm-up": vm.up, "vm-down": vm.down, "vm-shell": vm.shell}[arguments.verb]()
        case "vm-test":
            from e2e.harness import cases

            return cases.run_vm_cases(arguments.names)
        case "bench":
            from e2e.harness import benchmarks

            return benchmarks.run_benchmarks(arguments.names)
        case "probe-load":
            from e2e.harness import probe_load

            return probe_load.run_probe_load()
        case "differential":
            from e2e.differential import command

            return command.run_differential(arguments.dry_run)


def _logs(names: list[str], lines: int) -> bool:
    files = sorted(path for path in layout.LOGS.glob("*.log") if not names or path.stem in names)
    for path in files:
        print(f"==== {path}")
        print("\n".join(path.read_text(errors="replace").splitlines()[-lines:]))
    if not files:
        print(f"no such logs in {layout.LOGS}")
    return bool(files)


def _shell() -> None:
    from e2e.harness.cluster import Cluster

    cluster = Cluster.load()
    environment = {**os.environ, "KUBECONFIG": str(cluster.admin_kubeconfig), "PATH": layout.path_with_programs(),
                   "CONTAINERD_ADDRESS": str(cluster.cri_socket), "CONTAINERD_NAMESPACE": "k8s.io",
                   "PS1": "(rkubelet-e2e) \\w# "}
    print("kubectl and ctr work here; leave with exit")
    os.execve("/bin/bash", ["bash", "--norc", "-i"], environment)


if __name__ == "__main__":
    sys.exit(main())
