//! The text of `--help`: every flag with one line. Pure.

use std::fmt::Write as _;

use super::flags::{FLAGS, FlagSpec, Target};
use crate::config::FeatureGates;

const INTRODUCTION: &str = "\
rkubelet is a Kubernetes node agent: it registers this machine as a node, runs the pods bound to it through a CRI
runtime and reports what became of them. It takes the flags and the configuration file of the Go kubelet.

Usage:
  kubelet [flags]

Flags:
";

/// What `--help` prints to stdout.
pub fn help_text() -> String {
    let mut lines: Vec<(&str, String)> = FLAGS.iter().map(|spec| (spec.name, flag_line(spec))).collect();
    lines.push(("help", line("-h, --help", "Print this.")));
    lines.push(("version", line("    --version version[=true]", "Print the version; --version=raw prints all of it.")));
    lines.sort_by_key(|(name, _)| *name);
    let mut text = INTRODUCTION.to_owned();
    for (name, line) in lines {
        text.push_str(&line);
        if name == "feature-gates" {
            for known in FeatureGates::known_features() {
                let _ = writeln!(text, "                {known}");
            }
        }
    }
    text
}

fn flag_line(spec: &FlagSpec) -> String {
    let short = if spec.name == "v" { "-v, " } else { "    " };
    let usage = format!("{short}--{} {}", spec.name, spec.kind.type_name());
    let what = match spec.target {
        Target::Field(path) => format!("Sets {path} of the configuration."),
        Target::Flag(_) | Target::Nothing => spec.help.to_owned(),
    };
    let deprecated = if spec.deprecated.is_some() { " (DEPRECATED)" } else { "" };
    line(usage.trim_end(), &format!("{what}{deprecated}"))
}

fn line(usage: &str, what: &str) -> String {
    format!("  {usage:<60} {what}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_of_the_go_kubelet_has_a_line() {
        let text = help_text();
        for name in include_str!("../../tests/data/kubelet-1.37-flags.txt").lines() {
            let wanted = format!("--{name} ");
            let found = text.lines().filter(|line| line.split_at(6.min(line.len())).1.starts_with(&wanted)).count();
            assert_eq!(found, 1, "{name}");
        }
    }
}
